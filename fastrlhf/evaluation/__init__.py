"""Evaluation of trained policies: judges, win rates with intervals, held-out prompts during training."""
