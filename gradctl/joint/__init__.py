"""Forward and backward in one graph: traced through autograd itself, on operators that ONNX has."""
