"""The experiments of the papers, run through the code of this project."""
