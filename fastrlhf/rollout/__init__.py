"""Samples completions of prefixes and records their log-probs."""
