"""`fastrlhf plan`: memory and tokens per step before anything is loaded."""
