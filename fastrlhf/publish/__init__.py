"""What the hub is told about a model: its card, and the upload."""
