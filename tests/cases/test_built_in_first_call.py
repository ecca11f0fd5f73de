"""Layers that a model builds in its first call: once, in a copy, from the seed; then they are leaves."""

import pytest
import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError
from tests.judged import assert_passes, judge, wrong_tensors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, ctx.factor * (gradient * x).sum(0), None


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.factor, self.calls = nn.Linear(5, 3), nn.BatchNorm1d(3), factor, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        h = self.norm(self.a(x))
        return Scale.apply(self.last(h), self.weight(h), self.factor)

    def last(self, h: Tensor) -> Tensor:
        return h


class LayerThatWasNone(Net):
    def __init__(self, factor):
        super().__init__(factor)
        self.w = None

    def weight(self, h):
        if self.w is None:
            self.w = nn.Parameter(torch.randn(h.shape[1]))
        return self.w


class ModuleAdded(Net):
    def weight(self, h):
        if not hasattr(self, "layer"):
            self.add_module("layer", nn.Linear(h.shape[1], 1, bias=False))
        return self.layer.weight[0]


class ListFilled(Net):
    def __init__(self, factor):
        super().__init__(factor)
        self.weights = []

    def weight(self, h):
        if not self.weights:
            self.weights.append(torch.randn(h.shape[1], requires_grad=True))
        return self.weights[0]


class FlagBesideIt(Net):
    def __init__(self, factor):
        super().__init__(factor)
        self.is_built = False

    def weight(self, h):
        if not self.is_built:
            self.w, self.is_built = nn.Parameter(torch.randn(h.shape[1])), True
        return self.w


class DictByWidth(Net):
    def __init__(self, factor):
        super().__init__(factor)
        self.by_width = nn.ParameterDict()

    def weight(self, h):
        key = str(h.shape[1])
        if key not in self.by_width:
            self.by_width[key] = nn.Parameter(torch.randn(h.shape[1]))
        return self.by_width[key]


KINDS = {
    LayerThatWasNone: "param:w",
    ModuleAdded: "param:layer.weight",
    ListFilled: "param:weights.0",
    FlagBesideIt: "param:w",
    DictByWidth: "param:by_width.3",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_gradient_of_what_was_built_is_named(kind):
    assert wrong_tensors(judge(kind(2.0), X)) == [KINDS[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_twin_is_silent_and_the_users_model_builds_nothing(kind):
    model = kind(1.0)
    unit = judge(model, X)
    assert_passes(unit)
    assert KINDS[kind] in [row.tensor for row in unit.tensors]
    assert model.calls == [] and model.norm.num_batches_tracked == 0


def test_what_is_built_is_the_same_in_each_check():
    units = [judge(LayerThatWasNone(2.0), X) for _ in range(2)]
    assert units[0].tensors == units[1].tensors


class Lazy(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 3))
        self.w, self.factor = nn.Parameter(torch.randn(3)), factor

    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(self.net(x), self.w, self.factor)


def test_torchs_lazy_modules_have_their_shapes_inferred_in_a_copy():
    model = Lazy(1.0)
    unit = judge(model, X)
    assert_passes(unit)
    assert {"param:net.0.weight", "param:net.1.weight"} <= {row.tensor for row in unit.tensors}
    assert isinstance(model.net[0], nn.LazyLinear)
    assert wrong_tensors(judge(Lazy(2.0), X)) == ["param:w"]


def test_a_lazy_module_that_the_first_call_does_not_reach_is_an_error_that_names_it():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.LazyLinear(3)})
    model.forward = model["used"].forward
    with pytest.raises(
        TargetError, match=r"without a shape yet \(unused\.weight, unused\.bias\), and its first call"
    ) as error:
        judge(model, X)
    assert error.value.code == "GC112"


class MadeInEachCall(nn.Module):
    """A leaf of each call's own, by which the model differentiates: nothing is built."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.point = None

    def forward(self, x: Tensor) -> Tensor:
        self.point = self.a(x).detach().requires_grad_()
        return self.point.sin() + self.a(x)


def test_a_leaf_made_in_each_call_is_no_layer_and_not_named():
    unit = judge(MadeInEachCall(), X)
    assert_passes(unit)
    assert "GC421" not in {each.code for each in unit.findings}
