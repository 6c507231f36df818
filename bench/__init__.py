"""Benchmarks and experiments: `python -m bench COMMAND`. Every run appends its results as rows to the files in
bench/results."""
