"""Checks before a run: whether this machine works, what the model will see, and whether the run fits into memory."""
