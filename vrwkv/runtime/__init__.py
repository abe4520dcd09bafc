"""What every kind of run shares: errors, pictures, checkpoint files, processes, progress."""
