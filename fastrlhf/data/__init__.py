"""From the rows of a file to packs of tokens."""
