"""How a gradient is judged: tensors and callables in, numbers out. Knows no form, file or terminal."""
