"""Checks before a run: does this machine work, what will the model see, does the run fit into memory."""
