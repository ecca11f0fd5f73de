"""Decide whether each gradient of a model is the derivative of what the model computes, and attribute what is not."""
