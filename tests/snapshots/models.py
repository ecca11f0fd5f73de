"""Tiny models whose snapshots the tests take and verify, and how."""

from __future__ import annotations

import torch
from torch import nn

from gradctl.snapshots.take_snapshot import take_snapshot
from gradctl.snapshots.verify_snapshot import verify_snapshot
from gradctl.subject.loading.load import make_subject

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers with a normalisation between, in training mode: its bias before it is zero by cancellation."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.outer = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
        self.change = lambda outputs: outputs

    def forward(self, x):
        y = self.outer(self.norm(self.inner(x)).tanh())
        return self.change({"y": y, "best": y.argmax(1)})


def changed(function, model=None):
    """Return a model whose outputs a function changes."""
    model = model or Net()
    model.change = function
    return model


def scaled(name, factor=1.0001):
    """Return the model with the gradient of a parameter scaled in a hook."""
    model = Net()
    model.get_parameter(name).register_hook(lambda gradient: gradient * factor)
    return model


def take(path, model=None, inputs=X, **options):
    """Return the snapshot of a model."""
    return take_snapshot(make_subject(model or Net(), inputs), path, **options)


def verify(path, model=None, inputs=X, **options):
    """Return the unit of a model beside a snapshot."""
    return verify_snapshot(path, make_subject(model or Net(), inputs), **options)


def errors(unit):
    """Return code and tensor of each finding that is no note."""
    return [(each.code, each.tensor) for each in unit.findings if each.severity != "note"]
