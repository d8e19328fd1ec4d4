"""Evaluation tasks of lm-eval: by name, on a model, and their texts in the training data."""
