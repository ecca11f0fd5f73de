"""Custom Functions judged by themselves, on every kind of input that they are given: the right one is silent, the same
with its gradient times 1.01 is named, and none ends the check.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradctl.core.allows import Allows
from gradctl.core.findings import Finding
from gradctl.gradients.float64 import oracle_runner
from gradctl.gradients.functions import attribution as culprits
from gradctl.gradients.functions.attribution import FunctionCheck
from gradctl.gradients.functions.function_part import function_name
from gradctl.gradients.guard import unexplained
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch
from tests.judged import finding, judge

RIGHT, WRONG = 1.0, 1.01
EPSILON = torch.finfo(torch.float64).eps


def checked(model: Any, *args: Any, hidden_from: Collection[str] = ()) -> list[Finding]:
    """Return what is found about the custom Functions of a model, all their applications looked at."""
    subject = Subject(target="test", model=model, args=args)
    with unexplained() as failures:
        runner = oracle_runner(subject, "leaf", FunctionWatch()).runner
        runner.record()
        check = FunctionCheck(runner, Allows(()), EPSILON)
        check.judge(is_alarmed=True)
        found = check.findings(hidden_from, is_explained=True)
    assert failures.details() is None, failures.details()
    return found


def randn(*shape: int, seed: int = 1, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


# ---------------------------------------------------------------------- the Functions


class Sine(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return ctx.factor * gradient * x.cos(), None


class SetupSine(Sine):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)


class VmapSine(SetupSine):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x, factor):
        return VmapSine.apply(x, factor), in_dims[0]


class SumOfSquares(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.abs().pow(2).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return ctx.factor * 2 * x * gradient, None


class Scatter(Function):
    """Takes integers and a list; its gradient is sparse."""

    @staticmethod
    def forward(ctx, weight, index, sizes, mode, nothing, factor):
        ctx.save_for_backward(index)
        ctx.shape, ctx.factor = weight.shape, factor
        return weight[index]

    @staticmethod
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        sparse = torch.sparse_coo_tensor(index[None], ctx.factor * gradient, ctx.shape, check_invariants=False)
        return sparse, None, None, None, None, None


class SparseProduct(Function):
    @staticmethod
    def forward(ctx, sparse, x, factor):
        ctx.sparse, ctx.factor = sparse, factor
        return torch.sparse.mm(sparse, x)

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.factor * torch.sparse.mm(ctx.sparse.t(), gradient), None


class ComplexProduct(Function):
    @staticmethod
    def forward(ctx, x, y, factor):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return ctx.factor * gradient * y.conj(), gradient * x.conj(), None


class InPlace(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * 3 * gradient, None


class SortedWithIndices(Function):
    """Two outputs, one of them marked as not differentiable."""

    @staticmethod
    def forward(ctx, x, factor):
        values, indices = x.sort(dim=-1)
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        ctx.factor = factor
        return values, indices

    @staticmethod
    def backward(ctx, gradient, _):
        (indices,) = ctx.saved_tensors
        return ctx.factor * torch.zeros_like(gradient).scatter(-1, indices, gradient), None


class Once(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(ctx.factor * gradient.numpy() * x.detach().cos().numpy()), None


class Several(Function):
    """Two outputs, and a number between them."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin(), 7, x.cos()

    @staticmethod
    def backward(ctx, of_sine, _, of_cosine):
        (x,) = ctx.saved_tensors
        return of_sine * x.cos() - ctx.factor * of_cosine * x.sin(), None


class View(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Drops(Function):
    """Draws its own mask."""

    @staticmethod
    def forward(ctx, x, factor):
        mask = (torch.rand_like(x) > 0.5).to(x.dtype)
        ctx.save_for_backward(mask)
        ctx.factor = factor
        return x * mask

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return ctx.factor * gradient * mask, None


class Recomputes(Function):
    """Runs a closure again in backward, and asks autograd for its gradients."""

    @staticmethod
    def forward(ctx, run, factor, x, *parameters):
        ctx.run, ctx.factor, ctx.x, ctx.parameters = run, factor, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            y = ctx.run(x)
        of_x, *of_parameters = torch.autograd.grad(y, (x, *ctx.parameters), gradient)
        return None, None, ctx.factor * of_x, *of_parameters


class AccumulatesByItself(Recomputes):
    """As reversible networks do: the parameters are no arguments, and get their ``.grad`` as a side effect."""

    @staticmethod
    def forward(ctx, run, factor, x):
        ctx.run, ctx.factor, ctx.x = run, factor, x
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), gradient)
        return None, None, ctx.factor * x.grad


@torch.library.custom_op("gradctl_tests::sine", mutates_args=())
def sine_operator(x: Tensor, factor: float) -> Tensor:
    return x.sin()


def _sine_setup(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


sine_operator.register_autograd(
    lambda ctx, g: (ctx.factor * g * ctx.saved_tensors[0].cos(), None), setup_context=_sine_setup
)


@torch.library.custom_op("gradctl_tests::sines", mutates_args=())
def sines_operator(xs: list[Tensor], factor: float) -> list[Tensor]:
    return [x.sin() for x in xs]


def _sines_setup(ctx, inputs, output):
    xs, ctx.factor = inputs
    ctx.save_for_backward(*xs)


sines_operator.register_autograd(
    lambda ctx, gs: ([ctx.factor * g * x.cos() for g, x in zip(gs, ctx.saved_tensors, strict=True)], None),
    setup_context=_sines_setup,
)


# ---------------------------------------------------------------------- the places


class Model(nn.Module):
    """``body(model, h, factor)`` on the output of a linear layer."""

    def __init__(self, body: Any, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.body, self.factor = nn.Linear(4, 4), body, factor
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.register_buffer("sparse", torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.fc(x), self.factor)


def complex_product(model: Model, h: Tensor, factor: float) -> Tensor:
    return torch.view_as_real(ComplexProduct.apply(torch.complex(h, h.sin()), torch.complex(h.cos(), h), factor))


def sorted_values(model: Model, h: Tensor, factor: float) -> Tensor:
    values, indices = SortedWithIndices.apply(h, factor)
    return values * (1 + indices)


def several(model: Model, h: Tensor, factor: float) -> Tensor:
    sine, seven, cosine = Several.apply(h, factor)
    return sine * cosine * seven


def with_operation(h: Tensor, factor: float) -> Tensor:
    return Sine.apply(h, factor) * h


def in_transform(function: Any) -> Any:
    return lambda m, h, f: torch.vmap(torch.func.grad(lambda row: function.apply(row, f).pow(2).sum()))(h)


ROWS: dict[str, tuple[Any, Any]] = {
    "plain": (Sine, lambda m, h, f: Sine.apply(h, f).exp()),
    "rank 0 output": (SumOfSquares, lambda m, h, f: SumOfSquares.apply(h, f)),
    "rank 0 input": (Sine, lambda m, h, f: Sine.apply(h.sum(), f)),
    "one element": (Sine, lambda m, h, f: Sine.apply(h[:1, :1], f)),
    "an empty input beside it": (Sine, lambda m, h, f: (Sine.apply(h[:0], f), Sine.apply(h, f))),
    "sparse gradient": (
        Scatter,
        lambda m, h, f: Scatter.apply(m.fc.weight, torch.tensor([0, 2, 2]), [1, 2], "sum", None, f),
    ),
    "sparse input": (SparseProduct, lambda m, h, f: SparseProduct.apply(m.sparse, h, f)),
    "complex": (ComplexProduct, complex_product),
    "not contiguous": (Sine, lambda m, h, f: Sine.apply(h.t()[1:], f)),
    "expanded": (Sine, lambda m, h, f: Sine.apply(h.sum(0, keepdim=True).expand(3, 4), f)),
    "the same tensor twice": (ComplexProduct, lambda m, h, f: ComplexProduct.apply(h, h, f)),
    "a parameter": (ComplexProduct, lambda m, h, f: ComplexProduct.apply(m.fc.weight, h[:4], f)),
    "a parameter, and what it is in": (
        ComplexProduct,
        lambda m, h, f: ComplexProduct.apply(m.fc.bias, h + m.fc.bias, f),
    ),
    "setup_context": (SetupSine, lambda m, h, f: SetupSine.apply(h, f)),
    "torch.func.grad": (SetupSine, lambda m, h, f: torch.func.grad(lambda z: SetupSine.apply(z, f).exp().sum())(h)),
    "torch.vmap of grad": (SetupSine, in_transform(SetupSine)),
    "torch.vmap": (VmapSine, lambda m, h, f: torch.vmap(lambda row: VmapSine.apply(row, f) * row, in_dims=1)(h)),
    "torch.vmap with a rule of its own": (VmapSine, in_transform(VmapSine)),
    "checkpoint": (Sine, lambda m, h, f: checkpoint(with_operation, h, f, use_reentrant=False)),
    "reentrant checkpoint": (Sine, lambda m, h, f: checkpoint(with_operation, h, f, use_reentrant=True)),
    "in place": (InPlace, lambda m, h, f: InPlace.apply(h.sin(), f).exp()),
    "an output that is not differentiable": (SortedWithIndices, sorted_values),
    "once_differentiable": (Once, lambda m, h, f: Once.apply(h, f)),
    "several outputs": (Several, several),
    "an output that is a view": (View, lambda m, h, f: View.apply(h, f).exp()),
    "its own random numbers": (Drops, lambda m, h, f: Drops.apply(Drops.apply(h, f) + h, f)),
    "recomputes": (Recomputes, lambda m, h, f: Recomputes.apply(m.inner, f, h, *m.inner.parameters())),
    "fills .grad by itself": (AccumulatesByItself, lambda m, h, f: AccumulatesByItself.apply(m.inner, f, h)),
    "a registered operator": ("gradctl_tests::sine", lambda m, h, f: sine_operator(h, f)),
    "a registered operator on a list": ("gradctl_tests::sines", lambda m, h, f: sum(sines_operator([h, h.exp()], f))),
    "autograd.grad inside": (
        Sine,
        lambda m, h, f: torch.autograd.grad(Sine.apply(h, f).exp().sum(), h, create_graph=True)[0],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_right_function_is_silent(row):
    _, body = ROWS[row]
    assert [each.message for each in checked(Model(body, RIGHT), randn(6, 4))] == []


@pytest.mark.parametrize("row", ROWS)
def test_its_twin_is_named(row):
    function, body = ROWS[row]
    name = function if isinstance(function, str) else function_name(function)
    if row == "a registered operator on a list" and torch.__version__ >= "2.14":
        pytest.skip(
            "torch 2.14 applies its Function in C: the gradients are judged, and the operator named as any call"
        )
    errors = [each for each in checked(Model(body, WRONG), randn(6, 4)) if each.severity == "error"]
    assert [each.allow for each in errors] == [f"GC408:{name}"]
    assert "is not the derivative" in errors[0].message


# ---------------------------------------------------------------------- what is not judged


def test_a_function_that_gets_nothing_differentiable_is_passed_over():
    body = lambda m, h, f: h + Sine.apply(h.detach(), f)  # noqa: E731
    assert checked(Model(body, WRONG), randn(6, 4)) == []


def test_a_function_whose_gradient_this_model_never_takes_is_a_warning():
    body = lambda m, h, f: h + Sine.apply(h, f).detach()  # noqa: E731
    (found,) = checked(Model(body, WRONG), randn(6, 4))
    assert (found.severity, found.allow) == ("warning", "GC408:Sine")
    assert found.message.startswith("latent: Sine.backward is not the derivative in 'x': off by 1.00e-02 (relative)")


class AuxiliaryOutput(Several):
    """Ignores the cotangent of its last output (the logarithm of a normaliser, say)."""

    @staticmethod
    def backward(ctx, of_sine, _, of_cosine):
        (x,) = ctx.saved_tensors
        return of_sine * x.cos(), None


def test_an_output_that_this_model_does_not_use_is_no_error():
    used, auxiliary = (
        checked(Model(lambda m, h, f, k=k: AuxiliaryOutput.apply(h, f)[k], RIGHT), randn(6, 4)) for k in (0, 2)
    )
    assert {each.severity for each in used} <= {"warning"}
    assert [each.severity for each in auxiliary] == ["error"]


def test_an_exception_of_ours_is_a_note_and_not_the_end(monkeypatch):
    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(culprits, "survey", broken)
    unit = judge(Model(ROWS["plain"][1], RIGHT), randn(6, 4))
    assert (unit.verdict, finding(unit, "GC419").severity) == ("pass", "note")
