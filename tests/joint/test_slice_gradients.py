"""Gradients of parts of a tensor: beside each other where they do not meet, added up where they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gradctl.joint.slice_gradients import join_parts
from tests.joint.joined import differing

aten = torch.ops.aten


def backward(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def gradient(x: Tensor, cotangent: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(model(leaf), leaf, cotangent)[0]

    return gradient


def joined(model: Callable[[Tensor], Tensor], x: Tensor) -> set[str]:
    """Return the operators of a backward with its parts joined, whose gradient is autograd's."""
    cotangent = torch.randn_like(model(x))
    graph = make_fx(backward(model))(x, cotangent)
    join_parts(graph)
    graph.graph.eliminate_dead_code()
    other = torch.randn_like(x)
    torch.testing.assert_close(graph(other, cotangent), backward(model)(other, cotangent))
    return {node.target.__name__.split(".")[0] for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    "model",
    [
        lambda x: torch.stack([part.sin() * place for place, part in enumerate(x.chunk(3, 1), 1)]),
        lambda x: torch.stack([x[..., place].sin() * place for place in range(6)]),
        lambda x: x[:, :2].sin() + x[:, 4:].cos(),
        lambda x: x[1].sin() + x[3].cos(),
        lambda x: x[-1].sin() * x[0:1].cos(),
        lambda x: x[:, 5].sin(),
    ],
    ids=["chunks", "places", "slices with a gap", "rows with gaps", "a row and a slice", "one column"],
)
def test_parts_that_do_not_meet_are_beside_each_other(model: Callable[[Tensor], Tensor]) -> None:
    operators = joined(model, torch.randn(4, 6))
    assert "cat" in operators
    assert not operators & {"slice_backward", "select_backward", "zeros"}


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x[:, :4].sin() + x[:, 2:].cos(),
        lambda x: x[:, 0].sin() + x[:, 0].cos(),
        lambda x: x[:2].sum(1).sin() + x[:, :2].sum(0),
        lambda x: x[:, ::2].sin() + x[:, 1::2].cos(),
    ],
    ids=["overlap", "one part twice", "parts of two axes", "steps"],
)
def test_parts_that_meet_are_added(model: Callable[[Tensor], Tensor]) -> None:
    assert "add" in joined(model, torch.randn(4, 6))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 5), st.integers(1, 3), st.booleans()), min_size=1, max_size=5))
def test_whatever_the_parts_are(parts: list[tuple[int, int, bool]]) -> None:
    def model(x: Tensor) -> Tensor:
        found = [x[:, at].sin() if single else x[:, at : (at % 6) + many].cos().sum(1) for at, many, single in parts]
        return torch.stack([each * place for place, each in enumerate(found, 1)])

    joined(model, torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))


def test_rotated_halves_are_right_in_onnxruntime() -> None:
    def model(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1) * x + x[..., 1:3].sum()

    assert differing(model, torch.randn(2, 3, 4)) == []
