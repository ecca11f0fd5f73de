"""Pairs of a reference and a candidate: a difference that must be found, beside a right twin on which it is silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradctl
from gradctl.core.errors import TargetError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def compared(reference, candidate, inputs=X, **options):
    """Return the one unit of a comparison."""
    (unit,) = gradctl.compare(reference, inputs, candidate=candidate, **options).units
    return unit


def errors(unit):
    return {(each.code, each.tensor): each for each in unit.findings if each.severity == "error"}


def two_layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"map": {"0.weight": "{0}"}}, "GC124", "the candidate has no parameter '{0}'"),
        ({"map": {"0.*": "{*"}}, "GC124", "the candidate has no parameter '{weight'"),
        ({"map": {"0.weight": "0.weight", "1.weight": "0.weight"}}, "GC124", "both '0.weight' and '1.weight'"),
        ({"map": 5}, "GC118", "map=5 cannot be. Give a mapping"),
        ({"sizes": 5}, "GC128", "5 is no mapping"),
        ({"sizes": {"batch": 2.5}}, "GC128", "'batch=2.5' is not NAME=N,N"),
    ],
    ids=["braces", "one brace", "two to one", "no mapping", "sizes", "size"],
)
def test_an_invalid_argument_is_one_sentence(options, code, said):
    with pytest.raises(TargetError) as caught:
        compared(two_layers(), two_layers(), **options)
    assert caught.value.code == code
    assert said in caught.value.message


@pytest.mark.parametrize("options", [{"map": {"a": "b"}}, {"own_weights": True}], ids=["map", "own_weights"])
def test_what_applies_to_a_candidate_is_refused_without_one(options):
    with pytest.raises(TargetError, match="It applies to a candidate, and there is none"):
        gradctl.compare(two_layers(), X, forms="trace", **options)


class Tied(nn.Module):
    """Two applications of one weight, which has one name, or two."""

    def __init__(self, *names):
        super().__init__()
        weight = nn.Parameter(torch.eye(6) + 0.1)
        self.names = names
        for name in names:
            self.register_parameter(name, weight)

    def forward(self, x):
        first, last = getattr(self, self.names[0]), getattr(self, self.names[-1])
        return (x @ first).tanh() @ last


@pytest.mark.parametrize(
    ("reference", "candidate", "names"),
    [
        (("a", "b"), ("a",), {}),
        (("a",), ("a", "b"), {}),
        (("a", "b"), ("w",), {"a": "w"}),
        (("a", "b"), ("w",), {"a": "w", "b": "w"}),
    ],
    ids=["in the reference", "in the candidate", "one mapped", "both mapped"],
)
def test_of_the_names_of_a_tied_parameter_one_needs_a_partner(reference, candidate, names):
    unit = compared(Tied(*reference), Tied(*candidate), map=names)
    assert unit.verdict == "pass"
    assert "param:a" in {each.tensor for each in unit.tensors if each.quantity == "gradient"}
    assert not unit.findings


@pytest.mark.parametrize(
    "candidate",
    [lambda x: x.tanh() * (1 if x.requires_grad else 2), lambda x: x.tanh() * (1 if torch.is_grad_enabled() else 2)],
    ids=["requires_grad", "is_grad_enabled"],
)
def test_another_result_without_gradients_is_found(candidate):
    assert (
        "differs from the reference's in the candidate with no_grad"
        in errors(compared(torch.tanh, candidate))["GC301", "output"].message
    )


def test_a_candidate_that_runs_with_gradients_only_is_reported_unless_the_reference_does_so_too():
    def force(x):
        return -torch.autograd.grad((x**2).sum(), x, create_graph=True)[0]

    unit = compared(lambda x: -2 * x, force)
    assert "the candidate raises with no_grad where the reference runs" in errors(unit)["GC303", None].message
    assert compared(force, force).verdict == "pass"


class Exp(torch.autograd.Function):
    """exp; ``is_dense``: the backward reads the memory of its gradient in one piece, without a look at the strides."""

    @staticmethod
    def forward(ctx, x, is_dense):
        ctx.save_for_backward(x)
        ctx.is_dense = is_dense
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        if ctx.is_dense:
            there = min(gradient.untyped_storage().nbytes() // gradient.element_size(), gradient.numel())
            kept = torch.zeros(gradient.numel(), dtype=gradient.dtype)
            kept[:there] = gradient.as_strided((there,), (1,), 0)
            gradient = kept.view(gradient.shape)
        return gradient * x.exp(), None


def test_a_backward_that_does_not_look_at_the_strides_of_an_expanded_gradient_is_found():
    unit = compared(torch.exp, lambda x: Exp.apply(x, True))
    assert "in the candidate with expanded cotangent" in errors(unit)["GC402", "input:args.0"].message
    assert compared(torch.exp, lambda x: Exp.apply(x, False)).verdict == "pass"


def test_numbers_among_the_outputs_are_compared():
    def counted(factor):
        return lambda x: {"y": x.tanh(), "mean": factor * float(x.detach().mean()), "rows": len(x)}

    def counted_from_the_end(x):
        return {"y": x.tanh(), "mean": float(x.detach().flip(0).sum()) / x.numel(), "rows": x.shape[0]}

    assert set(errors(compared(counted(1.0), counted(1.01)))) == {("GC301", "output.mean")}
    assert compared(counted(1.0), counted_from_the_end).verdict == "pass"
    with pytest.raises(TargetError, match="Return the same structure"):
        compared(counted(1.0), lambda x: {"y": x.tanh()})


class NormByHand(nn.Module):
    """A batch norm in its own operations: its sum over the batch is zero by cancellation."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        variance = (x * x).mean(0) - x.mean(0) ** 2
        return (x - x.mean(0)) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_whose_sum_is_zero_by_cancellation_agree(dtype):
    reference = nn.BatchNorm1d(6, track_running_stats=False).to(dtype)
    assert compared(reference, NormByHand().to(dtype), X.to(dtype), sizes={"batch": [3, 5]}).verdict == "pass"


class Times(torch.autograd.Function):
    """The product with a factor, and the gradient of the input itself: wrong in the forward only, unless it is 1."""

    @staticmethod
    def forward(ctx, x, factor):
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_an_error_beside_a_mask_of_large_values_is_found(fill):
    masked = torch.arange(24).reshape(4, 6) % 2 == 0

    def of(factor):
        return lambda x: Times.apply(x, factor).masked_fill(masked, fill)

    assert ("GC301", "output") in errors(compared(of(1.0), of(1.001)))
    assert compared(of(1.0), lambda x: torch.where(masked, fill, x.clone())).verdict == "pass"


def test_an_error_in_a_tensor_that_is_much_smaller_than_others_is_found():
    def of(factor):
        return lambda x: (x.clone(), Times.apply(x * 1e-8, factor))

    assert set(errors(compared(of(1.0), of(1.01)))) == {("GC301", "output.1")}
    assert compared(of(1.0), lambda x: (x.clone(), x / 1e8)).verdict == "pass"


class Decaying(nn.Linear):
    """A layer that changes its weight after its use, which autograd refuses in the backward."""

    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            self.weight.mul_(0.9)
        return y


def test_the_error_of_a_candidate_that_takes_constants_only_is_shown():
    unit = compared(nn.Linear(6, 3), Decaying(6, 3))
    assert "modified by an inplace operation" in errors(unit)["GC303", None].message


def test_a_gradient_that_overflows_on_other_values_is_an_error():
    x = torch.linspace(-6, 6, 40)[None]
    unit = compared(lambda x: (-x * x).exp(), lambda x: 1 / (x * x).exp(), x)  # infinite from 9.4 on
    assert "relative error inf" in errors(unit)["GC402", "input:x"].message
    assert compared(lambda x: (-x * x).exp(), lambda x: torch.exp(-(x**2)), x).verdict == "pass"


def test_a_result_that_is_kept_for_a_shape_is_stale_on_other_values():
    class Cached(nn.Module):
        def __init__(self, by_values):
            super().__init__()
            self.by_values, self.results = by_values, {}

        def forward(self, x):
            key = (x.shape, float(x.detach().sum()) if self.by_values else None)
            if key not in self.results:
                self.results[key] = x.detach().tanh()
            return x.tanh() + self.results[key]

    def reference(x):
        return x.tanh() + x.detach().tanh()

    unit = compared(reference, Cached(by_values=False))
    assert "with seed after example" in errors(unit)["GC301", "output"].message
    assert compared(reference, Cached(by_values=True)).verdict == "pass"
