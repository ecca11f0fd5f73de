"""What a pair of kernels is, and how plain torch runs it: the oracle of the corpus, which knows nothing of gradctl."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

ALL = (torch.float32, torch.bfloat16, torch.float16)
# How a mistake shows: in float64; in a narrow dtype as a bias that its rounding could hide; there as lost precision.
Kind = Literal["meaning", "bias", "precision"]


@dataclass(frozen=True, eq=False)
class Wrong:
    """A candidate with one mistake.

    Attributes:
        candidate: the function, or the factory of the module.
        tensors: those that the mistake changes, and no others.
        kind: how it shows.
        dtypes: in which it shows; None: those of the pair.
        hidden_at: sizes of the inputs at which the candidate is right.
        on: the variation of the inputs that shows it, if the example does not.
        source: the published bug.
    """

    candidate: Callable[..., Any]
    tensors: str
    kind: Kind = "meaning"
    dtypes: tuple[torch.dtype, ...] | None = None
    hidden_at: Mapping[str, int] | None = None
    on: Literal["example", "non-contiguous"] = "example"
    source: str = ""

    @property
    def names(self) -> set[str]:
        """The names of the tensors."""
        return set(self.tensors.split())


@dataclass(frozen=True, eq=False)
class Pair:
    """A reference, its right twin and wrong candidates.

    Attributes:
        reference, right: functions of the inputs; factories if the pair is of modules.
        inputs: makes the inputs; takes a generator and sizes, and returns float32.
        wrong: by name.
        dtypes: in which the pair is tried.
        is_module: whether these are modules.
        renamed: the candidate's name of each parameter and buffer that has another one in the reference.
    """

    reference: Callable[..., Any]
    right: Callable[..., Any]
    inputs: Callable[..., tuple[Any, ...]]
    wrong: Mapping[str, Wrong]
    dtypes: tuple[torch.dtype, ...] = ALL
    is_module: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def draw(self, seed: int, dtype: torch.dtype, **sizes: int) -> tuple[Any, ...]:
        """Return random inputs; the same numbers in each dtype but for its rounding."""
        given = self.inputs(torch.Generator().manual_seed(seed), **sizes)
        return tuple(to_dtype(value, dtype) for value in given)

    def programs(self, candidate: Callable[..., Any], dtype: torch.dtype) -> tuple[Callable[..., Any], ...]:
        """Return the reference and a candidate in a dtype; modules with the same parameters and buffers."""
        if not self.is_module:
            return self.reference, candidate
        torch.manual_seed(0)
        reference, module = self.reference().to(dtype), candidate().to(dtype)
        module.load_state_dict({self.renamed.get(name, name): value for name, value in reference.state_dict().items()})
        return reference, module

    def evaluate(
        self, candidate: Callable[..., Any], inputs: tuple[Any, ...], dtype: torch.dtype, seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the reference computes in float64, and a candidate in a dtype, by the reference's names."""
        reference, program = self.programs(candidate, dtype)
        reference = copy.deepcopy(reference).double() if isinstance(reference, nn.Module) else reference
        names, old = _input_names(reference), {new: name for name, new in self.renamed.items()}
        true, found = (
            evaluate(each, tuple(to_dtype(value, width) for value in inputs), seed, names)
            for each, width in ((reference, torch.float64), (program, dtype))
        )
        parts = ((name.partition(":"), value) for name, value in found.items())
        return true, {kind + colon + old.get(name, name): value for (kind, colon, name), value in parts}

    def evaluate_reference(self, inputs: tuple[Any, ...], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Return what the reference itself computes in a dtype."""
        reference, _ = self.programs(self.right, dtype)
        return evaluate(reference, tuple(to_dtype(value, dtype) for value in inputs), seed, _input_names(reference))


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return a float tensor in another dtype, and anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return normal tensors of some shapes."""
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that fused kernels accumulate in: float32 for a narrow one."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def kernel(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a custom Function as fused kernels have it.

    Args:
        forward: takes the inputs; returns the output, or a tuple of outputs, and the list of tensors to save.
        backward: takes the saved tensors and the cotangents; returns a gradient, or None, for each input.
    """

    class Kernel(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output, saved = forward(*args)
            ctx.save_for_backward(*saved)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Any:
            return backward(ctx.saved_tensors, *cotangents)

    @functools.wraps(forward)
    def call(*args: Any) -> Any:
        return Kernel.apply(*args)

    return call


def narrow_only(candidate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a candidate that raises in float64, as compiled kernels do."""

    @functools.wraps(candidate)
    def call(*args: Any) -> Any:
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args):
            raise TypeError("this kernel takes float32, bfloat16 and float16")
        return candidate(*args)

    call.refuses_float64 = True
    return call


def in_float64(candidate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a candidate as it would compute in float64."""
    return candidate.__wrapped__ if hasattr(candidate, "refuses_float64") else candidate


def evaluate(
    program: Callable[..., Any], inputs: tuple[Any, ...], seed: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return outputs, gradients and buffers by name, for a Gaussian cotangent that is the same in each dtype.

    The program itself is left as it is; a gradient that is None counts as zero.
    """
    program = copy.deepcopy(program) if isinstance(program, nn.Module) else program
    leaves = [_leaf(value) for value in inputs]
    outputs = program(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, cotangents)
    found = {f"output.{n}" if len(outputs) > 1 else "output": out.detach() for n, out in enumerate(outputs)}
    named = {f"input:{name}": leaf for name, leaf in zip(names, leaves, strict=False)}
    if isinstance(program, nn.Module):
        named |= {f"param:{name}": parameter for name, parameter in program.named_parameters()}
        found |= {f"buffer:{name}": buffer for name, buffer in program.named_buffers()}
    for name, leaf in named.items():
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def relative_errors(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the errors relative to the norm of each tensor, or of its largest neighbour if its own is cancellation.

    Infinite if NaN and infinity are in other places.
    """
    sizes = {name: _norm(tensor[torch.isfinite(tensor)]) for name, tensor in true.items()}
    errors = {}
    for name, tensor in true.items():
        kind = _kind(name)
        neighbours = max(size for other, size in sizes.items() if _kind(other) == kind)
        scale = (sizes[name] if sizes[name] >= 1e-6 * neighbours else neighbours) or 1.0
        finite = torch.isfinite(tensor)
        same = torch.equal(finite, torch.isfinite(found[name]))
        errors[name] = _norm((found[name].double() - tensor)[finite]) / scale if same else math.inf
    return errors


def _kind(name: str) -> str:
    return {"input": "gradient", "param": "gradient"}.get(name.partition(":")[0], name.partition(":")[0][:6])


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _input_names(program: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(program.forward if isinstance(program, nn.Module) else program).parameters)
