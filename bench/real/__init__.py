"""`python -m bench real`: measurements on SmolLM2-135M-Instruct, a pretrained model, on a CPU."""
