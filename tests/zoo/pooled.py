"""The program of pytorch 185509, as the text of a file: two threads make inductor of torch 2.13 lose its gradients."""

from __future__ import annotations

__all__ = ["POOLED"]

POOLED = """
import torch
from torch import nn
from torch.nn import functional as F

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x, mask):
        y = self.conv(x)
        return torch.where(mask, y, F.max_pool2d(y, 3, 1, 1))

make_model = Pooled

def example_inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8, 8) > 0.5
"""
