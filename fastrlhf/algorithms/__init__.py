"""The algorithm boxes of the papers, one file each."""
