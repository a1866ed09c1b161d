"""Predicting masks, scoring them, statistics over scores, and the tables and pictures of both."""
