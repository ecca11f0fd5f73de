"""What affects the gradients of a model, and what is in a file."""
