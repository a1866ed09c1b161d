"""Adapters: the folder of a trained model's parameters, its task and its model card."""
