"""Everything around a training loop: the run, its inputs, optimizer, checkpoints and metrics."""
