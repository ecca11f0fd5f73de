"""Forward and backward in one graph: traced through autograd itself, with operators that ONNX has."""
