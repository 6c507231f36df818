"""The training algorithms of the papers, one file each."""
