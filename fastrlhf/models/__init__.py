"""Hugging Face models on packed batches: loading, attention that isolates sequences, the packed forward."""
