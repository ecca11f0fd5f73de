"""A backward that is right the first time only: through a retained graph again, or onto an existing ``.grad``."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.judged import assert_passes, codes, finding, judge

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Counting(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.scale = 1.0
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient * ctx.saved_tensors[0].cos() * ctx.scale
        ctx.scale *= 2
        return gradient


class Overwriting(Function):
    """Multiplies the slope that it keeps in place."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.slope.mul_(gradient)


class Freeing(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        slope, ctx.slope = ctx.slope, None
        return gradient * slope


class Right(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(5, 4), function

    def forward(self, x):
        return self.function.apply(self.linear(x))


class ClearsGradients(Net):
    def forward(self, x):
        self.zero_grad()
        return super().forward(x)


class SetsGradients(nn.Module):
    """Assigns ``.grad`` in a backward, where it should add."""

    def __init__(self, adds):
        super().__init__()
        self.weight, self.adds = nn.Parameter(torch.ones(5)), adds

    def forward(self, x):
        weight, adds = self.weight, self.adds

        class Scaled(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * weight.detach()

            @staticmethod
            def backward(ctx, gradient):
                own = (gradient * ctx.saved_tensors[0]).sum(0)
                weight.grad = own + weight.grad if adds and weight.grad is not None else own
                return gradient * weight.detach()

        return Scaled.apply(x)


def told(unit):
    return {each.tensor for each in unit.findings if each.code == "GC417" and each.severity == "error"}


@pytest.mark.parametrize("function", [Counting, Overwriting])
def test_a_backward_that_changes_what_it_reads_is_an_error(function):
    unit = judge(Net(function), X)
    assert unit.verdict == "fail"
    assert told(unit) == {"param:linear.weight", "param:linear.bias", "input:x"}
    assert {each.code for each in unit.findings if each.severity == "error"} >= {"GC417"}


def test_a_right_function_passes():
    unit = judge(Net(Right), X)
    assert_passes(unit)
    assert "GC417" not in codes(unit)


def test_a_function_that_frees_what_it_saved_passes_with_a_note():
    unit = judge(Net(Freeing), X)
    assert_passes(unit)
    assert finding(unit, "GC417").message.startswith("a second backward on the retained graph raises: TypeError")


def test_a_model_that_clears_gradients_in_forward_cannot_accumulate():
    assert told(judge(ClearsGradients(Right), X)) == {"param:linear.weight", "param:linear.bias"}


def test_a_backward_that_sets_a_gradient_cannot_accumulate():
    assert told(judge(SetsGradients(adds=False), X)) == {"param:weight"}


class Recomputed(nn.Module):
    def __init__(self, reentrant, preserve):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant, self.preserve = nn.Linear(5, 6), reentrant, preserve
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x):
        h = self.first(x)
        return checkpoint(self.block, h, use_reentrant=self.reentrant, preserve_rng_state=self.preserve)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_with_dropout_and_batch_norm_passes(reentrant):
    unit = judge(Recomputed(reentrant, preserve=True), X)
    assert_passes(unit)
    assert "GC417" not in codes(unit)


@pytest.mark.parametrize("layer", [nn.LSTM(5, 4), nn.MultiheadAttention(5, 1), nn.EmbeddingBag(7, 4)])
def test_torchs_own_layers_pass(layer):
    inputs = {nn.MultiheadAttention: (X, X, X), nn.EmbeddingBag: (torch.tensor([[1, 2], [1, 6]]),)}
    unit = judge(layer, *inputs.get(type(layer), (X,)))
    assert "GC417" not in codes(unit)
