"""Code that all parts share: user errors, atomic files, locks, signals, paths and value checks."""
