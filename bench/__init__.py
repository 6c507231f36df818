"""Measurements: `python -m bench COMMAND`. Every run appends its rows to bench/results."""
