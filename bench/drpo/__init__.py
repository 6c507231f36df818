"""`python -m bench train drpo`: one DR-PO update, ours, the padded semantics of the released code, and TRL's PPO."""
