"""Example inputs: read, described, proposed, varied."""
