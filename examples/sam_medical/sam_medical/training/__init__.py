"""Training runs: loop, losses, saved states, progress and record."""
