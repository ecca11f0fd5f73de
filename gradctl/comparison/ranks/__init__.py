"""A model on many ranks compared with the same model in one process."""
