"""ONNX files of torch.onnx.export, forward and joint."""
