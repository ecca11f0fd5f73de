"""Read, validate and run ONNX files."""
