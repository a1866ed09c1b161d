"""An adapter's folder: what was learned, and the task that it was learned for."""
