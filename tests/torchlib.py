"""One table of torch.onnx's conversions for all exports of a process: torch reads it anew from source for each.

That is a second of each export (torch 2.13, onnxscript 0.7), and what it gives hangs on the opset alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools

__all__ = ["share_conversions"]


def share_conversions() -> None:
    """Let each export take a copy of the first table; where torch has moved it, change nothing."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not isinstance(ONNXRegistry.from_torchlib, Shared):
            ONNXRegistry.from_torchlib = Shared(functools.cache(ONNXRegistry.from_torchlib), TORCHLIB_OPSET)


class Shared:
    """``ONNXRegistry.from_torchlib``, read once an opset; an export may add conversions of its own to its copy."""

    def __init__(self, first, opset):
        self.first, self.opset = first, opset

    def __call__(self, opset_version=None):
        """Return a table that is the caller's own."""
        found = copy.copy(self.first(self.opset if opset_version is None else opset_version))
        found.functions = {target: [*conversions] for target, conversions in found.functions.items()}
        return found
