"""Reads datasets, tokenises their rows and packs the tokens."""
