"""What every kind of run shares: errors, pictures, checkpoints, configuration, processes, progress, training loop."""
