"""`python -m bench train drpo`: compares one DR-PO update in this project with a padded reference and TRL's PPO.

The padded reference computes the same update as the code that the authors of DR-PO released.
"""
