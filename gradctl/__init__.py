"""gradctl: export, optimise and check the gradients of PyTorch graphs. Importing this does not import torch."""

__version__ = "0.1.0"
