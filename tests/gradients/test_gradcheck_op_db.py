"""Independent evidence: torch's own table of operators with their sample inputs, 540 of them with a derivative.

torch tests each with its own ``gradcheck``, element by element. Ours must agree, or the disagreement stands in
``KNOWN`` with its reason. The default run takes a sample of 40.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.findings import Unit
from gradctl.subject.tree import leaves, map_leaves
from tests.judged import judge, serious
from tests.sweeps import sampled


def operators() -> dict[str, Any]:
    """Return torch's table by full name, and undo what importing it does to the whole process."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    with pytest.MonkeyPatch.context() as undone:
        # The import forbids setting backend flags and wraps calls of scripted functions (seen in torch 2.13).
        undone.setattr(torch.backends, "disable_global_flags", lambda: None)
        for scripted in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            undone.setattr(scripted, "__call__", scripted.__call__)
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.full_name: op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes}


OPERATORS = operators()

# What is not "pass", with the reason. A refusal stands by its code.
KNOWN: dict[str, tuple[str, str]] = {
    "__rpow__": ("fail", "the samples raise negative numbers to fractions: the output is NaN, GC407"),
    "as_strided_scatter": ("fail", "the strides overlap, and every source that was overwritten gets a gradient"),
    "erfc": ("inconclusive", "at -4.8 the slope is 1e-10 of the value: float64 does not resolve it"),
    "nn.functional.max_unpool1d": ("fail", "an index occurs twice, and both sources get the gradient"),
    "nn.functional.max_unpool2d": ("fail", "as max_unpool1d"),
    "nn.functional.max_unpool3d": ("fail", "as max_unpool1d"),
    "normal": ("fail", "the gradient is stated to be 0, by design; with the seed held the draw moves with its mean"),
    "normal.number_mean": ("fail", "as normal, with its deviation"),
    "round.decimals_3": ("inconclusive", "stairs of 1e-3: rising to larger steps, flat to smaller ones"),
    "sparse.mm.reduce": ("GC112", "torch cannot copy a sparse CSR tensor"),
    "sparse.sampled_addmm": ("GC112", "torch cannot copy a sparse CSR tensor"),
}


def samples(name: str) -> Iterator[tuple[Any, list[Tensor]]]:
    """Yield up to two (function, its differentiable inputs) of an operator; the other arguments are bound."""
    op = OPERATORS[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    found = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        arguments = (sample.input, sample.args, sample.kwargs)
        inputs = {path: leaf.detach().clone() for path, leaf in leaves(arguments) if _asks(leaf) and leaf.numel()}
        function = bound(op, sample, arguments, list(inputs))
        if not inputs or not any(_asks(out) and out.numel() for _, out in leaves(function(*_asking(inputs)))):
            continue
        yield function, list(inputs.values())
        found += 1
        if found == 2:
            return


def bound(op: Any, sample: Any, arguments: Any, paths: list[str]) -> Any:
    """Return the operator as a function of the leaves at ``paths``."""

    def function(*tensors: Tensor) -> Any:
        given = dict(zip(paths, tensors, strict=True))
        fresh = map_leaves(lambda path, leaf: given.get(path, _constant(leaf)), arguments)
        return sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), fresh[0], *fresh[1], **fresh[2]))

    return function


def _asks(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _asking(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in inputs.values()]


def _constant(leaf: Any) -> Any:
    # Some operators write to their other arguments (running statistics), so each call gets its own.
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def verdict_of(name: str) -> tuple[str, list[str]]:
    try:
        units: list[Unit] = [judge(function, *inputs) for function, inputs in samples(name)]
    except TargetError as refusal:
        return refusal.code, [str(refusal)]
    assert units, f"{name} has no differentiable sample"
    for verdict in ("fail", "inconclusive", "skipped"):
        for unit in units:
            if unit.verdict == verdict:
                return verdict, serious(unit)
    return "pass", [message for unit in units for message in serious(unit)]


@pytest.mark.parametrize("name", sampled(sorted(OPERATORS), 30))
def test_an_operator_of_torch_gets_the_verdict_it_deserves(name):
    verdict, messages = verdict_of(name)
    assert verdict == KNOWN.get(name, ("pass", ""))[0], messages


def test_the_table_of_disagreements_names_operators_that_exist():
    assert set(KNOWN) <= set(OPERATORS)
