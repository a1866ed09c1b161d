"""S-SAM: the Segment Anything Model, tuned by its singular values and prompted with the name of a label."""
