"""What torch computes anew in each export of a process, computed once (torch 2.13, onnxscript 0.7): 1.5 s of each.

The table of conversions, which onnxscript reads from source, and the list of operators without kernels of their own.
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
    with contextlib.suppress(ImportError, AttributeError):
        import torch._export.utils as utils

        if not isinstance(utils._materialize_cpp_cia_ops, Materialize):
            utils._materialize_cpp_cia_ops = Materialize(utils._materialize_cpp_cia_ops)


class Shared:
    """``ONNXRegistry.from_torchlib``, read once an opset; an export may add conversions of its own to its copy."""

    def __init__(self, first, opset):
        self.first, self.opset = first, opset

    def __call__(self, opset_version=None):
        """Return a table that is the caller's own."""
        found = copy.copy(self.first(self.opset if opset_version is None else opset_version))
        found.functions = {target: [*conversions] for target, conversions in found.functions.items()}
        return found


class Materialize:
    """``_materialize_cpp_cia_ops``, done again only where operators were registered since."""

    def __init__(self, materialize):
        self.materialize, self.done = materialize, None

    def __call__(self):
        """Put all operators that decompose by themselves under ``torch.ops``."""
        import torch

        found = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if len(found) != self.done:
            self.materialize()
            self.done = len(found)
