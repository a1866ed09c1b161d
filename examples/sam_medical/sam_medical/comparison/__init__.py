"""Comparisons: runs of several methods under equal conditions, and their report."""
