"""The forms of a model, one file for each, and their table."""
