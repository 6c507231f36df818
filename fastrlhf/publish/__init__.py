"""Model cards, and the upload of models to the hub."""
