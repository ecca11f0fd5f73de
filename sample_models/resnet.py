"""A residual convolutional network with BatchNorm, in evaluation mode.

``gradctl gradcheck sample_models/resnet.py`` passes. With ``--train`` BatchNorm uses the statistics of the batch, and
the gradients are checked through them as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = Block(8, 8, stride=1)
        self.block2 = Block(8, 16, stride=2)
        self.head = nn.Linear(16, classes)

    def forward(self, image: Tensor) -> Tensor:
        h = self.block2(self.block1(self.stem(image).relu()))
        return self.head(h.mean((2, 3)))


def make_model() -> ResNet:
    torch.manual_seed(0)
    return ResNet().eval()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)),)
