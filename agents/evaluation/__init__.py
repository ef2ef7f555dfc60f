"""Measurements of the language model's predictions and of the effect of operations."""
