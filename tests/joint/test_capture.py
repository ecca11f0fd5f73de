"""The joint graph has the gradients that autograd has: onnxruntime on the exported ModelProto against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradctl.forms.form import CannotCapture
from tests.joint.joined import by_autograd, by_onnxruntime, differing, joint_graph

Case = tuple[Any, ...]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.round(x * scale) / scale

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return cotangent * (x.abs() < 1) * ctx.scale, None, None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * cotangent * ctx.saved_tensors[0].cos()


class Product(torch.autograd.Function):
    """Two outputs, one of them saved, in the style with ``setup_context``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x @ w, (x @ w).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        x, w, power = ctx.saved_tensors
        total = first + second * power
        return total @ w.T, x.T @ total


class Act(nn.Module):
    """A linear layer, and a function of it and the inputs."""

    def __init__(self, act: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.linear, *args, **kwargs)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


class Statistics(nn.Module):
    """Buffers written in place, replaced, and only read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("power", torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        self.power = self.power * 0.9 + hidden.detach().square().mean(0) * 0.1
        self.calls += 1
        return hidden * self.mean * self.scale + self.power


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    return model


def unused() -> nn.Module:
    model = Act(lambda linear, x: linear(x))
    model.other = nn.Linear(4, 4)
    return model


def hooked_parameter() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda gradient: gradient * 10)
    return model


def hooked_tensor(linear: nn.Module, x: Tensor) -> Tensor:
    hidden = linear(x)
    hidden.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return hidden.relu()


def hooked_module() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[1].register_full_backward_hook(lambda module, given, taken: (given[0] * 5,))
    model[2].register_full_backward_pre_hook(lambda module, taken: (taken[0] * 2,))
    return model


def in_place(linear: nn.Module, x: Tensor) -> Tensor:
    hidden = linear(x).mul_(2).tanh_() * 1
    hidden[:, 0] = hidden[:, 1] * 2
    wide = torch.zeros(3, 6)
    wide[:, 1:5] = hidden
    wide[:, 5] = x.sum()
    wide[0].mul_(3)
    return wide


def twice_checkpointed(reentrant: bool) -> nn.Module:
    def act(linear: nn.Module, x: Tensor) -> Tensor:
        first = checkpoint(lambda each: linear(each).tanh(), x, use_reentrant=reentrant)
        return checkpoint(linear, first, use_reentrant=reentrant) * 2

    return Act(act)


def structured(linear: nn.Module, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
    return {"scaled": linear(x) * scale, "parts": [linear(x).tanh(), x.detach() * 2], "count": 3}


def force(linear: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(linear(x).tanh().sum(), x, create_graph=True)[0]


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, Callable[[], Case]] = {
    "tied": lambda: (Tied(), torch.tensor([[1, 2], [3, 1]])),
    "frozen": lambda: (frozen(), rows(3, 4)),
    "unused": lambda: (unused(), rows(3, 4)),
    "parameter hook": lambda: (hooked_parameter(), rows(3, 4)),
    "tensor hook": lambda: (Act(hooked_tensor), rows(3, 4)),
    "module hooks": lambda: (hooked_module(), rows(3, 4)),
    "straight through": lambda: (Act(lambda linear, x: StraightThrough.apply(linear(x), 4.0, "name")), rows(3, 4)),
    "once differentiable": lambda: (Act(lambda linear, x: Once.apply(linear(x))), rows(3, 4)),
    "two outputs of a Function": lambda: (Act(lambda linear, x: Product.apply(x, linear.weight)[1]), rows(3, 4)),
    "no_grad": lambda: (Act(lambda linear, x: linear(x) * torch.no_grad()(linear)(x)), rows(3, 4)),
    "in place": lambda: (Act(in_place), rows(3, 4)),
    "checkpoint": lambda: (twice_checkpointed(False), rows(3, 4)),
    "reentrant checkpoint": lambda: (twice_checkpointed(True), rows(3, 4)),
    "buffers": lambda: (Statistics(), rows(3, 4)),
    "gradient inside": lambda: (Act(force), rows(3, 4)),
    "determinant": lambda: (Act(lambda linear, x: torch.linalg.det(linear(x))), rows(4, 4)),
    "parametrization": lambda: (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), rows(3, 4)),
    "attention, output transposed": lambda: (Attention(batch_first=True), rows(2, 5, 8)),
    "LSTM": lambda: (nn.LSTM(4, 5, 2, bidirectional=True), rows(3, 2, 4), (rows(4, 2, 5), rows(4, 2, 5))),
    "RNN": lambda: (nn.RNN(4, 5, nonlinearity="relu"), rows(3, 2, 4)),
    "float64": lambda: (nn.Linear(4, 4).double(), rows(3, 4).double()),
    "function": lambda: (lambda x, weight: (x @ weight).softmax(-1), rows(3, 4), rows(4, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_outputs_and_buffers_are_those_of_autograd(name):
    torch.manual_seed(0)
    model, *inputs = MODELS[name]()
    assert differing(model, *inputs) == []


def test_outputs_in_a_dictionary_and_inputs_by_keyword_have_their_names():
    torch.manual_seed(0)
    model, scale = Act(structured), rows(4)
    graph = joint_graph(model, rows(3, 4), scale=scale).graph
    assert differing(model, rows(3, 4), scale=scale) == []
    assert {each.name for each in graph.input} >= {"linear.weight", "input.scale", "grad_output.scaled"}
    assert "grad_output.parts.1" not in {each.name for each in graph.input}
    assert {each.name for each in graph.output} >= {"output.scaled", "output.parts.0", "grad.linear.bias"}


class Cached(nn.Module):
    """What it computes once, it keeps for its next call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.angles = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        if self.angles is None:
            self.angles = torch.arange(x.shape[0] * 4.0).view(-1, 4).cos()
        return self.linear(x) * self.angles


def test_what_a_model_keeps_between_its_calls():
    assert differing(Cached(), rows(3, 4)) == []


class NegatedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (2 if torch.compiler.is_exporting() or type(cotangent) is Tensor else -2)


def test_a_gradient_that_the_trace_sees_otherwise_is_found():
    model = Act(lambda linear, x: NegatedBackward.apply(linear(x)))
    assert set(differing(model, rows(3, 4))) == {"grad.linear.weight", "grad.linear.bias", "grad.input.args.0"}


class ReadingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 2 if cotangent.sum() > 0 else -cotangent


@torch.library.custom_op("gradctl_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("gradctl_tests::known", mutates_args=())
def known(x: Tensor) -> Tensor:
    return x * 2


known.register_fake(torch.empty_like)
for operator in (doubled, known):
    operator.register_autograd(lambda ctx, cotangent: cotangent * 2)


def packed(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True).data)


def of_values(act: Callable[..., Any], *shape: int) -> Callable[[], Case]:
    return lambda: (Act(act), rows(*shape or (3, 4)))


BY_VALUES = r"a branch, a loop, a size or a number depends on the values of a tensor \(test_capture.py, line \d+\):"
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "branch": (of_values(lambda linear, x: linear(x) if x.sum() > 0 else -x), BY_VALUES),
    "number": (of_values(lambda linear, x: linear(x) * float(x.max())), BY_VALUES),
    "item": (of_values(lambda linear, x: linear(x) * x.max().item()), BY_VALUES),
    "size": (of_values(lambda linear, x: linear(x)[:, : int(x[0].argmax()) + 1]), BY_VALUES),
    "list": (of_values(lambda linear, x: linear(x)[x.argmax(1).tolist()[:1]], 4, 4), BY_VALUES),
    "equality": (of_values(lambda linear, x: linear(x) if torch.equal(x, x) else x), BY_VALUES),
    "branch of a backward": (of_values(lambda linear, x: ReadingBackward.apply(linear(x))), BY_VALUES),
    "mask": (
        of_values(lambda linear, x: linear(x)[x > 0]),
        r"the size of the result of an index by a mask depends on values \(test_capture.py, line \d+\): multiply",
    ),
    "nonzero": (
        of_values(lambda linear, x: linear(x)[x.sum(1).nonzero()[:, 0]]),
        r"the result of aten.nonzero depends on values \(test_capture.py, line \d+\): keep all of it",
    ),
    "repeats": (
        of_values(lambda linear, x: linear(x).repeat_interleave(x.argmax(1), 0)),
        r"the result of repeat_interleave depends on values \(.*, line \d+\): pass output_size\.",
    ),
    "packed sequence": (
        of_values(packed, 2, 3, 4),
        r"a packed sequence has sizes that depend on values \(test_capture.py, line \d+\): pad it",
    ),
    "numpy": (
        of_values(lambda linear, x: linear(x) * float(x.detach().numpy().max())),
        "a tensor is converted to NumPy, which torch cannot trace; use torch operations "
        r"\(test_capture.py, line \d+\)\.",
    ),
    "condition": (
        of_values(lambda linear, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (linear(x),))),
        r"a part of the model that Dynamo compiles, as torch.cond is \(test_capture.py, line \d+\): use torch.where\.",
    ),
    "complex input": (
        lambda: (Act(lambda linear, x: linear(x.real)), torch.zeros(3, 4, dtype=torch.complex64)),
        r"'input.args.0' is complex64, which onnxruntime does not support on the CPU: pass it as torch.view_as_real\.",
    ),
    "no gradient": (of_values(lambda linear, x: linear(x).detach()), "no output requires a gradient"),
    "no fake implementation": (
        of_values(lambda linear, x: doubled(linear(x))),
        r"gradctl_tests::doubled has no fake implementation; .*\(test_capture.py, line \d+\)",
    ),
    "no operator of torch": (
        of_values(lambda linear, x: known(linear(x))),
        r"ONNX has no operator for gradctl_tests.known \(test_capture.py, line \d+\): it is not an operator of torch",
    ),
    "no conversion": (
        of_values(lambda linear, x: torch.linalg.svdvals(linear(x))),
        r"ONNX has no operator for aten._linalg_svd \(test_capture.py, line \d+\): compute it outside",
    ),
    "no conversion of what torch.onnx makes of it": (
        of_values(lambda linear, x: linear(x.to_sparse().to_dense())),
        r"ONNX has no operator for aten._to_sparse \(test_capture.py, line \d+\): use dense tensors\.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_say_is_refused_with_its_reason(name):
    build, reason = REFUSED[name]
    model, *inputs = build()
    with pytest.raises(CannotCapture, match=reason) as refused:
        joint_graph(model, *inputs)
    assert "\n" not in refused.value.reason


def written_where_positive(linear: nn.Module, x: Tensor) -> Tensor:
    hidden = linear(x).clone()
    hidden[hidden > 0] = hidden[hidden > 0] * 2
    return hidden


def routed(linear: nn.Module, x: Tensor) -> Tensor:
    """Two experts, each for the rows that it is to have."""
    hidden, outputs = linear(x), torch.zeros_like(x)
    for expert in range(2):
        own = (hidden.argmax(1) % 2 == expert).nonzero()[:, 0]
        outputs = outputs.index_add(0, own, hidden[own] * (expert + 1))
    return outputs


def of_some(linear: nn.Module, x: Tensor) -> Tensor:
    classes = torch.arange(len(x)) % 4
    kept = x.sum(1) > 0
    return torch.nn.functional.cross_entropy(linear(x)[kept], classes[kept])


WITHIN: dict[str, Callable[..., Any]] = {
    "mean of some": lambda linear, x: linear(x)[x > 0].square().mean(),
    "masked_select": lambda linear, x: torch.masked_select(linear(x), x > 0).exp().sum(),
    "mask of another size": lambda linear, x: torch.masked_select(linear(x), x[:, :1] > 0).exp().sum(),
    "written": written_where_positive,
    "experts": routed,
    "loss of some rows": of_some,
}


@pytest.mark.parametrize("name", WITHIN)
def test_sizes_may_depend_on_values_within_the_graph(name):
    assert differing(Act(WITHIN[name]), rows(6, 4)) == []


class Renormalised(nn.Module):
    """Its embedding writes to its weight in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        self.linear.weight.data.mul_(0.5)
        return self.linear(self.embedding(ids))


def test_a_parameter_that_the_forward_writes_to_is_an_output():
    torch.manual_seed(0)
    model, ids = Renormalised(), torch.tensor([1, 3])
    graph = joint_graph(model, ids)
    values, expected = by_autograd(model, ids)
    expected |= {"updated.embedding.weight": model.embedding.weight, "updated.linear.weight": model.linear.weight}
    found = by_onnxruntime(graph, values)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


def test_a_function_that_is_compiled_is_traced_like_any_other():
    torch.manual_seed(0)
    compiled = torch.compile(nn.functional.gelu, backend="eager")
    assert differing(Act(lambda linear, x: compiled(linear(x))), rows(3, 4)) == []
