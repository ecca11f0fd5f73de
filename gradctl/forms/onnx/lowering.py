"""What torch.onnx does with a program once it is a joint graph, without what it would do a second time.

A joint graph has three times the nodes of its forward. Of the time of ``torch.onnx.export`` and ``optimize``, two
thirds went to tracing it anew for decompositions that are done, and to the one rewrite rule, ``SlicesSplit``, whose
matcher walks the whole graph at every node (torch 2.13, onnxscript 0.7; tests/benchmarks/joint_speed.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import Sequential, common
from onnxscript.rewriter.rules import common as rules

__all__ = ["decomposed", "optimize"]

_RULES = (
    rules.mul_by_1_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.materialize_reshape_shape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
)
_TIMES = 2  # as onnxscript's own optimizer: what is folded may match a rule, and what is rewritten may fold
_TIDY = (
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.LiftSubgraphInitializersToMainGraphPass(),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.OutputFixPass(),
    common.NameFixPass(),
)


class _Decomposed(torch.export.ExportedProgram):
    def run_decompositions(self, decomp_table: dict[Any, Callable[..., Any]] | None = None) -> _Decomposed:
        return self


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program as one that torch.onnx takes as it is; an operator that it does not know is then refused."""
    same = copy.copy(program)
    same.__class__ = _Decomposed
    return same


def optimize(model: ir.Model) -> None:
    """Fold constants, take out what undoes itself, and give initializers and equal nodes one place."""
    common.InlinePass()(model)
    for _ in range(_TIMES):
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model, _RULES)
    Sequential(*_TIDY)(model)
