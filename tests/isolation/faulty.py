"""Models that do something else first, and whether a process is gone: what tests of isolation share."""

from __future__ import annotations

import contextlib
import os
import select

__all__ = ["is_gone", "written"]

# A linear model whose forward first does something else; ``{body}`` is what.
MODEL = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
import torch
from torch import nn


class Net(nn.Linear):
    def forward(self, x):
{body}
        return super().forward(x)


def make_model():
    return Net(3, 2)


def example_inputs():
    return (torch.ones(2, 3),)
"""


def written(path, body="pass"):
    """Write the model with ``body`` in its forward, and return the path."""
    path.write_text(MODEL.format(body="\n".join(f"        {line}" for line in body.splitlines())))
    return path


def is_gone(pid):
    """Wait, at most 20 s, for the process to end, and tell whether it did."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        with os.fdopen(descriptor):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(20_000))
    return True
