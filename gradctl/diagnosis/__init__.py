"""Location and cause of the differences of two programs."""
