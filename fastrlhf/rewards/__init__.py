"""Rewards of tokens: the reward model's score, reward functions, KL, DPO rewards and penalties."""
