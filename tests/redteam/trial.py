"""One program, checked: was the bug found, was a right program passed."""

from __future__ import annotations

import time
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import GradctlError
from gradctl.core.names import NOT_JUDGED
from tests.judged import judge, serious
from tests.redteam.programs import Program

__all__ = ["FINE", "Trial", "changes", "tried"]

# What may come of a planted program, and of a right one; the others are faults of gradctl.
FINE = ("found", "named", "equal", "passed", "warned")


@dataclass(frozen=True)
class Trial:
    """What gradcheck made of a program.

    ``outcome`` of a planted one is found, named (as not judged, or by a warning), missed, or equal (the bug changes
    nothing there); of a right one passed, warned, flagged or inconclusive. Of both: refused (with a sentence), crash.
    """

    program: Program
    outcome: str
    said: str
    seconds: float


def tried(program: Program) -> Trial:
    """Return what gradcheck makes of the program."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, args = program.build()
            unit = judge(model, *args)
    except Exception as error:
        kind = "refused" if isinstance(error, GradctlError) else "crash"
        last = traceback.format_exc().strip().splitlines()[-3:]
        return Trial(program, kind, " | ".join(last), time.perf_counter() - start)
    open_rows = [each.tensor for each in unit.tensors if each.verdict in ("unresolved", "nondeterministic")]
    said = "; ".join(serious(unit)) or f"{unit.verdict} {unit.reason or ''} {', '.join(open_rows)}"
    if program.bug is None:
        outcome = {"fail": "flagged", "inconclusive": "inconclusive", "skipped": "inconclusive", "pass": "passed"}
        word = outcome[unit.verdict]
        word = "warned" if word == "passed" and serious(unit) else word
    elif unit.verdict == "fail":
        word = "found"
    elif serious(unit):
        word = "named"
    else:
        changed = changes(program)
        apart = {each.tensor for each in unit.tensors if each.verdict in (*NOT_JUDGED, "unresolved")}
        visible = {name for name, change in changed.items() if change > 1e-6}
        if not changed and not program.is_hidden:
            word = "equal"
        else:
            word = "named" if visible and visible <= apart else "missed"
    return Trial(program, word, said, time.perf_counter() - start)


def changes(program: Program) -> dict[str, float]:
    """Return what the bug changes: each leaf of the graph whose gradient it changes, and by how much of its norm.

    This is the oracle of what is planted: torch's own backward, in float64 and along random cotangents, of the program
    and of its clean twin, which compute the same but for the bug.
    """
    wrong, right = _gradients(program), _gradients(program.twin)
    changed = {}
    for name in {**wrong, **right}:
        a, b = wrong.get(name), right.get(name)
        if a is None or b is None:
            changed |= {name: 1.0} if a is not b else {}
        elif not torch.equal(a, b):
            changed[name] = float((a - b).norm() / b.norm())
    return changed


def _gradients(program: Program) -> dict[str, Tensor]:
    """Return gradients by name: parameters as gradctl names them, other leaves of the graph by number."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, args = program.build()
        for each in _tensors(args):
            if each.is_floating_point() or each.is_complex():
                each.requires_grad_()
        torch.manual_seed(0)
        outputs = [each for each in _tensors(model(*args)) if each.requires_grad]
        torch.manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    finally:
        torch.set_default_dtype(default)
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    names = {id(parameter): f"param:{name}" for name, parameter in named}
    leaves = _leaves(outputs)
    return {names.get(id(leaf), str(number)): leaf.grad for number, leaf in enumerate(leaves) if leaf.grad is not None}


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    nodes = [output.grad_fn for output in outputs]
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop(0)
        leaves += [node.variable] if hasattr(node, "variable") else []
        following = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(following)
        nodes += dict.fromkeys(following)
    return leaves


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in containers and in objects, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    inner = vars(value).values() if inner is None and hasattr(value, "__dict__") else inner or ()
    return [tensor for each in inner for tensor in _tensors(each)]
