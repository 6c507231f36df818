"""The reward of a token and its addends."""
