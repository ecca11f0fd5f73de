"""TorchScript modules as forms, for ``trace`` and ``script``. TorchScript is deprecated, and absent on new Pythons.

Private to torch (seen in 2.10 to 2.14): ``torch.jit._recursive.concrete_type_store``.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from gradctl.forms.form import CannotCapture, Captured, named_tensors
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.subject.instance import Instance


def capture_script(form: str, compile_to_script: Callable[[], Any]) -> Captured:
    """Return the form that ``torch.jit`` creates from a model.

    Raises:
        CannotCapture: TorchScript is absent, or rejects the model.
    """
    if not hasattr(getattr(torch, "jit", None), form):
        raise CannotCapture(f"torch {torch.__version__} has no torch.jit.{form} on this Python.")
    _forget_types_without_methods()
    start = perf_counter()
    try:
        with silenced():
            scripted = compile_to_script()
    except Exception as error:  # the compiler or the user's model may raise anything
        raise CannotCapture(
            f"torch.jit.{form} refuses the model: {reason_of(error)}", traceback.format_exc()
        ) from error
    return wrap_script(form, scripted, perf_counter() - start)


def wrap_script(form: str, scripted: Any, seconds: float = 0.0) -> Captured:
    """Return a script, just compiled or loaded from a file, as a form."""
    return Captured(
        form,
        scripted,
        *named_tensors(scripted),
        seconds,
        operators=_count_operators(scripted),
        artifact=scripted,
        model=scripted if isinstance(scripted, torch.nn.Module) else None,
    )


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return a copy of the script with float64 parameters and buffers, to run with promotion enabled."""
    script = captured.artifact
    if not isinstance(script, torch.nn.Module):
        return captured
    with torch.no_grad():  # with gradients enabled, a script copies its parameters to non-leaf tensors
        converted = copy.deepcopy(script).double()
    for own, parameter in zip(script.parameters(), converted.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    return wrap_script(captured.form, converted)


def _forget_types_without_methods() -> None:
    """Drop the partly compiled classes of a failed script, whose methods the next one could not "redefine"."""
    store = getattr(torch.jit._recursive, "concrete_type_store", None)
    if store is not None:
        for types in store.type_store.values():
            types[:] = [each for each in types if each in store.methods_compiled]


def _count_operators(scripted: Any) -> dict[str, int]:
    """Return calls by operator in the inlined graph, the most frequent first."""
    graph = getattr(scripted, "inlined_graph", None)
    kinds: Counter[str] = Counter()
    pending = list(graph.nodes()) if graph is not None else []
    while pending:
        node = pending.pop()
        if node.kind().startswith(("aten::", "quantized::")):
            kinds[node.kind().partition("::")[2]] += 1
        pending.extend(inner for block in node.blocks() for inner in block.nodes())
    return dict(kinds.most_common())
