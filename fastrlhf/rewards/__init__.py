"""What a token earns: the addends of the reward."""
