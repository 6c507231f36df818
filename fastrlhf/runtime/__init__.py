"""What surrounds a training loop: the run, its inputs, optimizer, checkpoints and metrics."""
