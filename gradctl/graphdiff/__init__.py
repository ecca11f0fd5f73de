"""How two ONNX graphs differ."""
