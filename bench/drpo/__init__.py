"""`python -m bench train drpo`: compares one DR-PO update in this project with a padded reference and TRL's PPO.

The padded reference has the semantics of the code that the authors of DR-PO released.
"""
