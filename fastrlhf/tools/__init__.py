"""What to ask before a run: is this machine sound, what will the model see, will it fit."""
