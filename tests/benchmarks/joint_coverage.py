"""Which operators of torch give a right joint graph of forward and backward: torch's own table, with its sample inputs.

    python -m tests.benchmarks.joint_coverage [--samples 3] [--jobs 1] [--only NAME …] [--json FILE]

Each operator runs in a process of its own, so that a crash or a time-out is counted and ends nothing else. Its samples
are the first differentiable one in float32, and others drawn from those whose shapes or options differ. A sample is

- ``right``: outputs, gradients and what is written to, of the form ``onnx-joint``, are those of eager autograd in
  float64;
- ``WRONG``: they are not, and nothing was said;
- ``refused``: the form says why it cannot take the operator, while the form ``onnx`` gives its outputs right;
- ``no forward``: it is refused, and the form ``onnx`` refuses it too or gives wrong outputs;
- ``crashed`` or ``timeout``.

An operator is what the worst of its samples is; one that is refused in part counts as refused.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import json
import logging
import multiprocessing
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from gradctl.core.errors import TargetError
from gradctl.forms.form import CannotCapture
from gradctl.forms.onnx import forward as onnx
from gradctl.forms.onnx import joint as onnx_joint
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves
from tests.gradients.test_gradcheck_op_db import OPERATORS as ALL
from tests.gradients.test_gradcheck_op_db import bound

OPERATORS = {name: op for name, op in ALL.items() if torch.float32 in op.dtypes}
# Worst first: an operator is the first of these that one of its samples is.
STATES = ("WRONG", "crashed", "timeout", "refused", "no forward", "right")
# Far above what float32 rounds, far below what a wrong formula does; ten times what eager's own float32 is off by is
# rounding too (an ill-conditioned matrix).
RTOL = 1e-3
CONSIDERED = 200


@dataclass(frozen=True, slots=True)
class Case:
    """What one sample of an operator gave."""

    operator: str
    sample: str
    state: str
    reason: str = ""


class Operator(nn.Module):
    """An operator as a model of the tensors that ask for a gradient; other floats, which it may write to, are buffers.

    Args:
        function: the operator, of the inputs and then the buffers.
        kept: values of the buffers.
    """

    def __init__(self, function: Callable[..., Any], kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.function = function
        for index, value in enumerate(kept):
            self.register_buffer(f"kept{index}", value.detach().clone())

    def forward(self, *inputs: Tensor) -> Any:
        # No runtime takes complex numbers; as pairs it does.
        return map_leaves(lambda _, leaf: _pairs(leaf), self.function(*inputs, *self.buffers()))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One differentiable sample: a model of its leaves, in float32 and in float64."""

    text: str
    model: Operator
    promoted: Operator
    inputs: tuple[Tensor, ...]


def samples(name: str, count: int) -> Iterator[Sample]:
    """Yield the first differentiable sample in float32 of an operator, and others drawn from those that differ."""
    op = OPERATORS[name]
    _seed()
    found: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {}
    for sample in op.sample_inputs("cpu", torch.float32, requires_grad=True):
        arguments = (sample.input, sample.args, sample.kwargs)
        inputs = {path: leaf.detach().clone() for path, leaf in leaves(arguments) if _asks(leaf) and leaf.numel()}
        text = ", ".join(_text(leaf) for _, leaf in leaves(arguments))
        is_dense = all(leaf.layout is torch.strided for leaf in inputs.values())
        if inputs and is_dense and not sample.broadcasts_input:
            found.setdefault(text, (sample, arguments, inputs))
        if len(found) == CONSIDERED:
            break
    names = list(found)
    order = names[:1] + random.Random(0).sample(names[1:], len(names[1:]))
    given = 0
    for text in order:
        sample, arguments, inputs = found[text]
        kept = {path: leaf for path, leaf in leaves(arguments) if path not in inputs and _is_float(leaf)}
        paths = [*inputs, *kept]
        wide = map_leaves(lambda _, leaf: _promoted(leaf), arguments)
        model = Operator(bound(op, sample, arguments, paths), kept.values())
        promoted = Operator(bound(op, sample, wide, paths), map(_promoted, kept.values()))
        try:
            has_gradient = any(name.startswith("gradient") for name in _of_eager(model, tuple(inputs.values())))
        except RuntimeError:  # it reads what is beside its tensor in memory
            continue
        if has_gradient:
            yield Sample(text, model, promoted, tuple(inputs.values()))
            given += 1
        if given == count:
            return


def state_of(sample: Sample) -> tuple[str, str]:
    """Return what the joint graph of a sample is, and why."""
    subject = Subject(target="operator", model=sample.model, args=sample.inputs)
    wanted, tolerated = _references(sample)
    try:
        instance = Instance(subject)
        captured = onnx_joint.capture(instance)
    except (CannotCapture, TargetError) as refusal:
        reason = refusal.reason if isinstance(refusal, CannotCapture) else refusal.message
        return ("refused" if _forward_is_right(subject, wanted, tolerated) else "no forward"), reason
    try:
        found = _results(captured.call, captured.buffers, instance.inputs()[0])
    except Exception as error:  # onnxruntime raises RuntimeError and others
        return ("crashed" if _forward_is_right(subject, wanted, tolerated) else "no forward"), str(error)
    return _compared(found, wanted, tolerated)


def _forward_is_right(subject: Subject, wanted: dict[str, Tensor], tolerated: dict[str, float]) -> bool:
    try:
        instance = Instance(subject)
        captured = onnx.capture(instance)
        with torch.no_grad():
            given = _named(captured.call(*instance.inputs()[0]))
    except Exception:  # whatever the exporter or onnxruntime raises, there is no forward
        return False
    outputs = {name: each for name, each in wanted.items() if name.startswith("output")}
    return _compared(given, outputs, tolerated)[0] == "right"


def _references(sample: Sample) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return eager's results in float64, and how far off each may be, relative to its norm."""
    native = _of_eager(sample.model, sample.inputs)
    try:
        wanted = _of_eager(sample.promoted, [_promoted(each) for each in sample.inputs])
    except RuntimeError:  # an operator that takes float32 alone
        return native, dict.fromkeys(native, RTOL)
    return wanted, {name: max(RTOL, 10 * _error(native[name], wanted[name])) for name in wanted}


def _of_eager(model: Operator, inputs: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    return _results(model, dict(model.named_buffers()), inputs)


def _results(function: Callable[..., Any], buffers: Mapping[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """Return outputs, gradients by fixed random cotangents, and buffers after the call.

    No gradient is zero, where there is one by another input.
    """
    asking = [each.detach().clone().requires_grad_() for each in inputs]
    _seed()
    outputs = _named(function(*asking))
    differentiable = [each for each in outputs.values() if each.requires_grad and each.numel()]
    cotangents = [_cotangent(each, seed) for seed, each in enumerate(differentiable)]
    found = torch.autograd.grad(differentiable, asking, cotangents, allow_unused=True) if differentiable else [None]
    gradients = {}
    if any(each is not None for each in found):
        for index, (given, each) in enumerate(zip(asking, found, strict=True)):
            gradients[f"gradient {index}"] = torch.zeros_like(given) if each is None else each
    written = {f"buffer {name}": each.clone() for name, each in buffers.items()}
    return {**{name: each.detach() for name, each in outputs.items()}, **gradients, **written}


def _cotangent(output: Tensor, seed: int) -> Tensor:
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.to(output.dtype)


def _compared(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerated: dict[str, float]) -> tuple[str, str]:
    largest = max((float(_finite(each).abs().max()) for each in wanted.values() if each.numel()), default=0.0)
    for name, reference in wanted.items():
        given = found.get(name)
        if given is None or given.shape != reference.shape:
            return "WRONG", f"{name} is {'missing' if given is None else f'of shape {tuple(given.shape)}'}"
        if any((test(given) != test(reference)).any() for test in (torch.isfinite, torch.isnan)):
            return "WRONG", f"{name} is finite, or no number, in other places than eager's"
        error = _error(given, reference)
        # A gradient that cancels to zero has no relative error: it is rounding beside the largest value there is.
        absolute = float((_finite(given) - _finite(reference)).norm())
        if error > tolerated[name] and absolute > 1e-6 * largest * max(1, reference.numel()) ** 0.5:
            return "WRONG", f"{name} is off by {error:.1e} of its norm"
    return "right", ""


def _error(given: Tensor, reference: Tensor) -> float:
    wide, exact = _finite(given), _finite(reference)
    return float((wide - exact).norm() / exact.norm().clamp_min(1e-30))


def _finite(tensor: Tensor) -> Tensor:
    wide = tensor.detach().to(torch.float64)
    return torch.where(wide.isfinite(), wide, torch.zeros_like(wide))


def _named(value: Any) -> dict[str, Tensor]:
    return {f"output {path}": leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor)}


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _asks(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _pairs(leaf: Any) -> Any:
    return torch.view_as_real(leaf.resolve_conj()) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float32


def _promoted(leaf: Any) -> Any:
    if leaf is torch.float32:
        return torch.float64
    return leaf.detach().double() if _is_float(leaf) else leaf


def _text(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else str(leaf)


def _work(name: str, count: int, pipe: Any) -> None:
    """Send a case for each sample; runs in a process of its own."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # Its table sets the seed inside of an operator, which no graph can; here it is set before each call. What the
    # import does to a process is undone where it is imported first.
    from torch.testing._internal import common_methods_invocations

    common_methods_invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    for sample in samples(name, count):
        pipe.send(("begins", sample.text))
        try:
            state, reason = state_of(sample)
        except Exception:
            state, reason = "crashed", traceback.format_exc().strip()
        pipe.send(("ends", Case(name, sample.text, state, reason)))
    pipe.close()


@dataclass(slots=True)
class _Running:
    name: str
    process: Any
    pipe: Any
    deadline: float
    cases: list[Case]
    sample: str | None = None

    def read(self) -> bool:
        """Take what it has sent; return whether it has ended."""
        try:
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                self.sample = value if kind == "begins" else None
                if kind == "ends":
                    self.cases.append(value)
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                self.cases.append(Case(self.name, self.sample or "", "crashed", f"exit code {self.process.exitcode}"))
            return True
        if time.monotonic() > self.deadline:
            self.process.kill()
            self.process.join()
            self.cases.append(Case(self.name, self.sample or "", "timeout"))
            return True
        return False


def cases(names: list[str], count: int = 3, *, jobs: int = 1, timeout_seconds: float = 60.0) -> Iterator[list[Case]]:
    """Yield the cases of each operator as they are there, each from a forked process."""
    _warm_up()
    context = multiprocessing.get_context("fork")
    pending, running = list(reversed(names)), []
    while pending or running:
        while pending and len(running) < jobs:
            name = pending.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, count, theirs))
            process.start()
            theirs.close()
            running.append(_Running(name, process, ours, time.monotonic() + timeout_seconds, []))
        wait([each.pipe for each in running], timeout=1.0)
        ended = [each for each in running if each.read()]
        running = [each for each in running if each not in ended]
        yield from (each.cases for each in ended)


def _warm_up() -> None:
    """Import what an export imports, once for all processes that are forked."""
    # Each export parses the 500 functions of onnxscript's library anew, which is half of its time (torch 2.13).
    registry = ONNXRegistry.from_torchlib
    if not hasattr(registry, "cache_info"):
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(registry))
    with suppress(CannotCapture):
        onnx_joint.export_graph(Instance(Subject(target="warm-up", model=nn.Linear(1, 1), args=(torch.ones(1, 1),))))
    ONNXRegistry.from_torchlib()


def verdict(of_one: list[Case]) -> Case:
    """Return the worst case of an operator."""
    return min(of_one, key=lambda case: STATES.index(case.state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=sorted(OPERATORS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="write each case to this file, a line each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Case] = []
    for of_one in cases(options.only, options.samples, jobs=options.jobs):
        found.extend(of_one)
        for case in of_one:
            print(f"{case.state:<10} {case.operator} ({case.sample[:60]}) {_line(case.reason)[:150]}", flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(asdict(case)) + "\n")
    table(found)


def table(found: list[Case]) -> None:
    """Print counts by operator and by sample, then what is not right."""
    by_operator = collections.defaultdict(list)
    for case in found:
        by_operator[case.operator].append(case)
    worst = [verdict(each) for each in by_operator.values()]
    counts, sampled = (collections.Counter(case.state for case in each) for each in (worst, found))
    print(f"\n{'':<12}{'operators':>10}{'samples':>10}")
    for state in reversed(STATES):
        print(f"{state:<12}{counts[state]:>10}{sampled[state]:>10}")
    right, forward = counts["right"], len(worst) - counts["no forward"]
    print(f"right of those whose forward is right: {right} of {forward}, {right / max(forward, 1):.1%}")
    for state in STATES[:-1]:
        for case in sorted((each for each in worst if each.state == state), key=lambda each: each.operator):
            print(f"{state:<10} {case.operator} ({case.sample[:60]}): {_line(case.reason)}")


def _line(text: str) -> str:
    return text.splitlines()[-1] if text.startswith("Traceback") else " ".join(text.split())


if __name__ == "__main__":
    main()
