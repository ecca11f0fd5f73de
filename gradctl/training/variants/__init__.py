"""Variants of the training step, one file and one row of the table each."""
