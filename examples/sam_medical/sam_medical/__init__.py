"""Segment medical images by the names of labels: S-SAM, its rivals, and the commands that train and use them."""

__version__ = "0.1.0"
