"""A transformer encoder over token numbers: embedding, two layers of attention and feed-forward, a language head.

``gradctl gradcheck sample_models/transformer.py`` passes. The key bias in ``in_proj_bias`` cannot move the output
(softmax ignores a shift), so a third of that gradient is zero by cancellation: that is right too.


``gradctl compare sample_models/transformer.py --form ddp:2 --form fsdp:2 --form tp:2`` runs it on two ranks, the last
form by ``tp_plan``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    def __init__(self, tokens: int = 20, width: int = 16, length: int = 6) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.token(ids) + self.position))


def make_model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


# Tensor parallelism: the feed-forward's columns and rows are divided between the ranks.
tp_plan = {"layers.layers.*.linear1": "colwise", "layers.layers.*.linear2": "rowwise"}


def example_inputs() -> tuple[Tensor]:
    return (torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1)),)
