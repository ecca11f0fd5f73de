"""Free sizes of the joint graph, and those that are computed from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture
from gradctl.forms.onnx.joint import export_graph
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from tests.joint.joined import by_autograd, by_onnxruntime


class Act(nn.Module):
    """A linear layer, and a function of what it gives."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Attention(nn.Module):
    """Its dropout is drawn for batch times heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)[0]


def graph_of(model: nn.Module, dynamic: dict[int, str], sizes: tuple[int, int] = (2, 3)) -> Any:
    subject = Subject(target="test", model=model, args=(torch.randn(*sizes, 4),), kwargs={})
    return ir.to_proto(export_graph(Instance(subject, keep_hooks=True), dynamic={"x": dynamic}).artifact)


def shapes_of(graph: Any) -> dict[str, list[int | str]]:
    return {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in graph.graph.input
    }


@pytest.mark.parametrize(
    ("act", "dynamic", "size"),
    [
        (lambda hidden: hidden.reshape(-1, 4), {0: "batch"}, "3*batch"),
        (lambda hidden: torch.cat([hidden, hidden[:1]]), {0: "batch"}, "batch + 1"),
        (lambda hidden: hidden.reshape(-1, 4), {0: "batch", 1: "time"}, None),
    ],
)
def test_a_cotangent_of_a_computed_size(act, dynamic, size):
    torch.manual_seed(0)
    model = Act(act)
    graph = graph_of(model, dynamic)
    if size is not None:
        assert shapes_of(graph)["grad_output"][0] == size
    values, expected = by_autograd(model, torch.randn(5, 4 if 1 in dynamic else 3, 4))
    found = by_onnxruntime(graph, values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


def test_a_mask_of_a_computed_size():
    torch.manual_seed(0)
    model = Attention()
    graph = graph_of(model, {0: "batch", 1: "time"})
    assert shapes_of(graph)["random.attention"] == ["2*batch", "time", "time"]
    values, expected = by_autograd(model, torch.randn(5, 7, 4))  # which seeds with 0
    torch.manual_seed(0)
    found = by_onnxruntime(graph, {**values, "random.attention": torch.empty(10, 7, 7).bernoulli_(0.8)})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_a_parameter_of_a_draw_is_a_free_size_by_its_name():
    graph = graph_of(Act(lambda hidden: hidden[torch.randperm(hidden.shape[0])]), {0: "batch"})
    assert {each.key: each.value for each in graph.metadata_props} == {
        "random": '{"distribution": "permutation", "n": "batch"}'
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3),
        nn.Conv2d(4, 3, (3, 2), stride=(2, 3), padding=(1, 0)),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 3, 1, stride=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
    ],
    ids=str,
)
def test_heights_and_widths_are_free(layer):
    torch.manual_seed(0)
    subject = Subject(target="test", model=layer, args=(torch.randn(2, 4, 8, 10),), kwargs={})
    free = {"input": {2: "height", 3: "width"}}
    graph = ir.to_proto(export_graph(Instance(subject, keep_hooks=True), dynamic=free).artifact)
    for height, width in ((9, 13), (14, 8)):
        layer.zero_grad()
        values, expected = by_autograd(layer, torch.randn(2, 4, height, width))
        found = by_onnxruntime(graph, values)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)


def first_rows(hidden: Tensor) -> Tensor:
    assert hidden.shape[0] <= 20
    if hidden.shape[0] > 30:
        raise ValueError
    return hidden[:, 0] + torch.arange(80.0).view(20, 4)[: hidden.shape[0]]


def test_what_a_model_asserts_of_a_free_size_is_no_branch():
    torch.manual_seed(0)
    model = Act(first_rows)
    graph = graph_of(model, {0: "batch"})
    values, expected = by_autograd(model, torch.randn(17, 3, 4))
    found = by_onnxruntime(graph, values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


def by_size(hidden: Tensor) -> Tensor:
    return hidden if hidden.shape[0] < 4 else 2 * hidden


LINE = by_size.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (by_size, f"a branch, a loop or a number depends on batch (test_dynamic_shapes.py, line {LINE}): "),
        (lambda hidden: sum(row.sin() for row in hidden.split(4)), "what split does depends on batch: "),
        (lambda hidden: torch.ones(20, 3, 4)[: hidden.shape[0]] * hidden, "a slice requires batch <= 20: assert "),
    ],
)
def test_a_model_that_does_one_thing_at_some_sizes_and_another_at_others_is_refused(act, said):
    with pytest.raises(CannotCapture) as refused:
        graph_of(Act(act), {0: "batch"}, sizes=(3, 3))
    assert refused.value.reason.startswith(said)


@pytest.mark.parametrize(
    ("act", "dynamic", "said"),
    [
        (
            lambda hidden: hidden,
            {2: "width"},
            "the model fixes the size width to 4, which --dynamic declares as symbolic.",
        ),
        (
            lambda hidden: hidden.reshape(3, -1).reshape(3, 3, 4),
            {0: "batch"},
            "the model fixes the size batch to 3, which --dynamic declares as symbolic.",
        ),
        (
            lambda hidden: hidden[:, 0] + hidden.sum((0, 2))[:, None],
            {0: "batch", 1: "time"},
            "batch and time of --dynamic are always equal: use one name for both.",
        ),
    ],
)
def test_a_size_that_is_not_free_is_refused(act, dynamic, said):
    with pytest.raises(CannotCapture) as refused:
        graph_of(Act(act), dynamic, sizes=(3, 3))
    assert refused.value.reason == said


def test_an_example_of_one_is_too_small():
    with pytest.raises(
        CannotCapture, match=r"the model fixes the size batch to 1, .* Give an example with two or more"
    ):
        graph_of(Act(lambda hidden: hidden), {0: "batch"}, sizes=(1, 3))
