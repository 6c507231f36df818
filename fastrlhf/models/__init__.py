"""Loads Hugging Face models and runs them on packed batches, in which the sequences do not see each other."""
