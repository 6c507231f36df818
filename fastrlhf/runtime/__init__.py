"""Everything around the training loops: runs, inputs, the optimiser, checkpoints and metrics."""
