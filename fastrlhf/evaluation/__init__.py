"""Evaluates policies: judges, win rates with intervals, and responses to held-out prompts during training."""
