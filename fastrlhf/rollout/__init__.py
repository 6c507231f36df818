"""Sampling: prefixes in, completions with their log-probs out."""
