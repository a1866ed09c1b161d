"""Prediction, scores, statistics, tables and figures."""
