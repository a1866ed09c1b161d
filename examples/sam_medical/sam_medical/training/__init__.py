"""A training run: loop, losses, states on disk, progress and record."""
