"""The body of every ``repro.py``: its functions are copied into the script one by one, so plain torch and no gradctl.

A check prints what it compares and returns the exit code: 1 while the bug is there, 0 once it is gone. Everything else
that may happen is an exception, which the script turns into 2.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def strided(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return a copy that is laid out in memory with these strides."""
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, (tuple, list)):
        children = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for child in children for tensor in tensors_in(child)]


def numbered(kind: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by names such as ``input 0``."""
    return {f"{kind} {number}": tensor for number, tensor in enumerate(tensors)}


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a module by name; a function has none."""
    return dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}


def buffers_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the buffers of a module by name; a function has none."""
    return dict(model.named_buffers()) if isinstance(model, torch.nn.Module) else {}


def fresh(value: Any) -> Any:
    """Return the inputs for one call: copies, each float tensor a leaf that requires a gradient."""
    if isinstance(value, torch.Tensor):
        copied = value.detach().clone() if value.is_contiguous() else strided(value.detach(), value.stride())
        return copied.requires_grad_(copied.is_floating_point() or copied.is_complex())
    if isinstance(value, dict):
        return {key: fresh(child) for key, child in value.items()}
    return type(value)(fresh(child) for child in value) if isinstance(value, (tuple, list)) else value


def with_loss(call: Callable[..., Any], loss: Callable[..., Any], takes_inputs: bool) -> Callable[..., Any]:
    """Return ``call`` followed by the loss."""

    def called(*args: Any, **kwargs: Any) -> Any:
        value = call(*args, **kwargs)
        return loss(value, *args, **kwargs) if takes_inputs else loss(value)

    return called


def leaves_of(module: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Return the leaves that require a gradient, by name."""
    tensors = {**parameters_of(module), **numbered("input", tensors_in(inputs))}
    return {name: leaf for name, leaf in tensors.items() if leaf.requires_grad}


def run_backward(outputs: list[torch.Tensor], seed: int) -> None:
    """Run the backward of the outputs that require a gradient, each with a Gaussian cotangent."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in outputs]
    pairs = [(t, cotangent.to(t.dtype)) for t, cotangent in zip(outputs, drawn, strict=True) if t.requires_grad]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [cotangent for _, cotangent in pairs])


def run(call: Callable[..., Any], module: Any, inputs: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Return outputs, gradients (of a Gaussian cotangent) and state after one call, each by name."""
    args, kwargs = fresh(inputs)
    leaves = leaves_of(module, (args, kwargs))
    for leaf in leaves.values():
        leaf.grad = None
    seed_everything(seed)
    outputs = tensors_in(call(*args, **kwargs))
    run_backward(outputs, seed)
    state = {**buffers_of(module), **numbered("input", tensors_in((args, kwargs)))}
    return {
        "output": {name: t.detach().clone() for name, t in numbered("output", outputs).items()},
        "gradient": {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()},
        "buffer": {name: t.detach().clone() for name, t in state.items()},
    }


def relative_error(eager: torch.Tensor | None, form: torch.Tensor | None) -> float:
    """Return ||form - eager|| / ||eager||; infinite if only one exists, or shapes or NaN differ."""
    if eager is None or form is None:
        return 0.0 if eager is form else float("inf")
    if eager.shape != form.shape or eager.dtype != form.dtype:
        return float("inf")
    kind = torch.complex128 if eager.is_complex() else torch.float64
    eager, form = eager.to_dense().to(kind), form.to_dense().to(kind)
    finite = torch.isfinite(eager)
    if not torch.equal(torch.nan_to_num(eager[~finite]), torch.nan_to_num(form[~finite])):
        return float("inf")
    difference, size = float((form - eager)[finite].norm()), float(eager[finite].norm())
    return 0.0 if difference == 0 else difference / size if size else float("inf")


def print_rows(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print names and numbers in columns, the first few rows."""
    print(f"{headings[0]:32}" + "".join(f"{heading:>20}" for heading in headings[1:]))
    for name, *numbers in rows[:10]:
        print(f"{name:32}" + "".join(f"{'none' if value is None else f'{value:.6e}':>20}" for value in numbers))


def capture_trace(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model traced on these inputs, and the owner of its parameters."""
    if args and kwargs:
        raise NotImplementedError("torch.jit.trace takes inputs by position or by keyword, and not both")
    options = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    traced = torch.jit.trace(model, check_trace=False, strict=False, **options)  # type: ignore[no-untyped-call]
    return traced, traced


def capture_script(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model scripted, and the owner of its parameters."""
    scripted: Any = torch.jit.script(model)
    return scripted, scripted


def capture_export(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model exported, and the owner of its parameters."""

    class Whole(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

    module = model if isinstance(model, torch.nn.Module) else Whole()
    exported = torch.export.export(module, args, kwargs, strict=False).module(check_guards=False)
    return exported, exported


def capture_aot(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model compiled by AOTAutograd with eager kernels, and the owner of its parameters."""
    return torch.compile(model, backend="aot_eager"), model


def capture_compile(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model compiled by inductor, random numbers drawn as in eager, and the owner of its parameters."""
    return torch.compile(model, options={"fallback_random": True}), model


def capture_onnx(model: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """Return the model as onnxruntime runs it; it has no gradients."""
    import onnxruntime

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(tensors_in(self.inner(*args, **kwargs)))

    exported = torch.export.export(Whole(), args, kwargs, strict=False)
    program: Any = torch.onnx.export(exported, dynamo=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        program.save(str(Path(folder) / "model.onnx"))
        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), providers=["CPUExecutionProvider"])

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors_in((args, kwargs))]
        names = [value.name for value in session.get_inputs()]
        return [torch.from_numpy(each) for each in session.run(None, dict(zip(names, given, strict=True)))]

    return call, None


def compare_calls(
    eager: list[dict[str, dict[str, Any]]], form: list[dict[str, dict[str, Any]]], quantity: str
) -> list[tuple[Any, ...]]:
    """Return name, norms and relative error of each tensor of each call, the largest error first."""
    rows: list[tuple[Any, ...]] = []
    for number, (reference, candidate) in enumerate(zip(eager, form, strict=True), 1):
        for name in {**reference[quantity], **candidate[quantity]}:
            pair = reference[quantity].get(name), candidate[quantity].get(name)
            norms = [None if each is None else float(each.to_dense().double().norm()) for each in pair]
            called = f"{name} (call {number})" if len(eager) > 1 else name
            rows.append((called, *norms, relative_error(*pair)))
    return sorted(rows, key=lambda row: -row[-1])


def compare_with_form(
    make_model: Callable[[], Any],
    capture: Callable[..., tuple[Callable[..., Any], Any]],
    finish: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    example: Any,
    inputs: Any,
    calls: int,
    seed: int,
    quantity: str,
    tolerance: float,
) -> int:
    """Capture the model on ``example``, run it and eager on ``inputs``, and compare a quantity."""
    eager = make_model()
    expected = [run(finish(eager), eager, inputs, seed) for _ in range(calls)]
    model = make_model()
    state = copy.deepcopy(model.state_dict()) if isinstance(model, torch.nn.Module) else {}
    seed_everything(seed + 1)
    form, module = capture(model, *fresh(example))
    if state:
        model.load_state_dict(state)  # capturing runs the model, which may change its buffers
    try:
        found = [run(finish(form), module, inputs, seed) for _ in range(calls)]
    except Exception as error:
        if quantity != "raises":
            raise
        print(f"eager runs; the captured form raises {type(error).__name__}: {error}")
        return 1
    if quantity == "raises":
        print("the captured form runs, as eager does")
        return 0
    rows = compare_calls(expected, found, quantity)
    print_rows((quantity, "norm in eager", "norm in the form", "relative error"), rows)
    differing = sum(row[-1] > tolerance for row in rows)
    print(f"{differing} of {len(rows)} differ by more than {tolerance:.1e} (relative)")
    return int(differing > 0)


def to_float64(value: Any) -> Any:
    """Return the inputs in float64."""
    if isinstance(value, torch.Tensor):
        kind = torch.complex128 if value.is_complex() else torch.float64 if value.is_floating_point() else value.dtype
        return strided(value, value.stride()).to(kind)
    if isinstance(value, dict):
        return {key: to_float64(child) for key, child in value.items()}
    return type(value)(to_float64(child) for child in value) if isinstance(value, (tuple, list)) else value


def inner_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the sum of products; of complex tensors, over real and imaginary parts."""
    return float((left.to_dense().conj() * right).real.sum())


def derivative(value_at: Callable[[float], float]) -> tuple[float, float]:
    """Return the derivative at 0 by central differences, and its error estimate: the best of many steps."""
    best = (float("nan"), float("inf"))
    for exponent in range(4, 22):
        step = 2.0**-exponent
        points = [value_at(step), value_at(-step), value_at(step / 2), value_at(-step / 2)]
        coarse, fine = (points[0] - points[1]) / (2 * step), (points[2] - points[3]) / step
        rounding = 16 * sys.float_info.epsilon * max(map(abs, points)) / step
        value = (4 * fine - coarse) / 3
        error = abs(value - fine) + rounding
        best = min(best, (value, error), key=lambda each: each[1])
    return best


def compare_with_finite_differences(
    make_model: Callable[[], Any],
    finish: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    inputs: Any,
    seed: int,
    tolerance: float,
) -> int:
    """Compare autograd's derivative with finite differences in float64, along a random direction for each tensor."""
    model = make_model()
    if isinstance(model, torch.nn.Module):
        model.double()
    buffers = list(buffers_of(model).values())
    saved = [buffer.clone() for buffer in buffers]
    args, kwargs = fresh(to_float64(inputs))
    leaves = leaves_of(model, (args, kwargs))
    generator = torch.Generator().manual_seed(seed)

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
        seed_everything(seed)
        return [t for t in tensors_in(finish(model)(*args, **kwargs)) if t.requires_grad]

    at_point = outputs()
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in at_point]
    torch.autograd.backward(at_point, cotangents)
    rows, wrong = [], 0
    for name, leaf in leaves.items():
        direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        direction /= direction.norm()
        origin, gradient = leaf.detach().clone(), leaf.grad

        def value_at(
            distance: float,
            leaf: torch.Tensor = leaf,
            origin: torch.Tensor = origin,
            direction: torch.Tensor = direction,
        ) -> float:
            with torch.no_grad():
                leaf.copy_(origin + distance * direction)
            return sum(inner_product(w, t.detach()) for w, t in zip(cotangents, outputs(), strict=True))

        measured, error = derivative(value_at)
        with torch.no_grad():
            leaf.copy_(origin)
        stated = 0.0 if gradient is None else inner_product(gradient, direction)
        is_wrong = abs(stated - measured) > max(10 * error, tolerance * max(abs(stated), abs(measured)))
        wrong += is_wrong
        rows.append((not is_wrong, (name, None if gradient is None else stated, measured, abs(stated - measured))))
    rows.sort(key=lambda row: row[0])
    print_rows(("derivative by", "autograd", "finite differences", "difference"), [row for _, row in rows])
    print(f"{wrong} of {len(rows)} differ by more than {tolerance:.1e} (relative)")
    return int(wrong > 0)


def look_for_nan(
    make_model: Callable[[], Any],
    finish: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    inputs: Any,
    seed: int,
    quantity: str,
) -> int:
    """Count NaN and infinite elements of outputs or gradients, for finite weights and inputs."""
    model = make_model()
    if not all(torch.isfinite(tensor).all() for tensor in tensors_in((inputs, parameters_of(model)))):
        raise ValueError("the inputs or weights themselves are not finite")
    found = run(finish(model), model, inputs, seed)[quantity]
    rows = [(name, float(t.numel()), float((~torch.isfinite(t)).sum())) for name, t in found.items() if t is not None]
    rows.sort(key=lambda row: -row[-1])
    print_rows((quantity, "elements", "NaN or infinite"), rows)
    return int(any(bad for *_, bad in rows))
