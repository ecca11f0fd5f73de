"""The optimisations of torch.onnx for a joint graph, without the steps that are redundant for it.

A joint graph has three times the nodes of its forward. Of the time of ``torch.onnx.export`` and ``optimize``, two
thirds went to tracing it again for decompositions that are done, and to the one rewrite rule, ``SlicesSplit``, whose
matcher visits the whole graph at every node (torch 2.13, onnxscript 0.7; tests/benchmarks/joint_speed.py).
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
_TIMES = 2  # as onnxscript's own optimizer: folded nodes may match a rule, and rewritten nodes may fold
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


def skip_decompositions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return a program that torch.onnx does not decompose again; it then rejects operators that it does not support."""
    same = copy.copy(program)
    same.__class__ = _Decomposed
    return same


def optimize(model: ir.Model) -> None:
    """Fold constants, remove operations that cancel, and merge equal initializers and equal nodes."""
    common.InlinePass()(model)
    for _ in range(_TIMES):
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model, _RULES)
    Sequential(*_TIDY)(model)
