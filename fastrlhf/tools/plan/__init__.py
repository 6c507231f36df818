"""`fastrlhf plan`: predicts the memory and the tokens per step of a run without loading its models."""
