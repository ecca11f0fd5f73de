"""Runtimes that models are shipped to, each a form if it is installed: OpenVINO, ExecuTorch."""
