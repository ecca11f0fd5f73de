"""Right models that are easily called wrong: each passes, with nothing above a note."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.judged import assert_passes, judge

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(5, 4, generator=GENERATOR)
SQUARE = torch.randn(4, 4, generator=GENERATOR)


class Wrapped(nn.Module):
    """A function of submodules and inputs, as a module."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def linear(inputs: int = 4, outputs: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def between(parametrized: nn.Module) -> nn.Module:
    return nn.Sequential(parametrized, nn.Tanh(), linear(parametrized.out_features, 2))


PARAMETRIZED = {
    "spectral norm": lambda: between(parametrizations.spectral_norm(linear())).train(),
    "weight norm": lambda: between(parametrizations.weight_norm(linear())),
    "old weight norm": lambda: between(nn.utils.weight_norm(linear())),
    "orthogonal, exponential": lambda: between(parametrizations.orthogonal(linear(4, 4))),
    "orthogonal, cayley": lambda: between(parametrizations.orthogonal(linear(4, 4), orthogonal_map="cayley")),
    "orthogonal, householder": lambda: between(parametrizations.orthogonal(linear(), orthogonal_map="householder")),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_weight_passes(name):
    assert_passes(judge(PARAMETRIZED[name](), X))


def packed(net: Wrapped, x: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 1, 3]), batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(net.rnn(sequences)[0], batch_first=True)[0]


def test_a_recurrent_net_over_sequences_of_different_lengths_passes():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 4)
    assert_passes(judge(Wrapped(packed, rnn=nn.GRU(4, 5, 2, batch_first=True, bidirectional=True)), x))


def alignment(net: Wrapped, x: Tensor, labels: Tensor) -> Tensor:
    return F.ctc_loss(net.fc(x).log_softmax(-1), labels, torch.tensor([12, 10]), torch.tensor([4, 3]))


def test_an_alignment_loss_passes():
    torch.manual_seed(0)
    x, labels = torch.randn(12, 2, 4), torch.randint(1, 6, (2, 4))
    assert_passes(judge(Wrapped(alignment, fc=linear(4, 6)), x, labels))


def masked_row(net: Wrapped, x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(net.fc(x), x, x, attn_mask=mask)


def test_attention_with_a_row_that_sees_nothing_passes():
    torch.manual_seed(0)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    assert_passes(judge(Wrapped(masked_row, fc=linear(4, 4)), torch.randn(2, 2, 5, 4), mask))


FUNCTION_TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap of grad": lambda net, x: torch.func.vmap(torch.func.grad(lambda z: net.fc(z).tanh().sum()))(x),
    "jacrev": lambda net, x: torch.func.vmap(torch.func.jacrev(lambda z: net.fc(z).tanh()))(x),
    "jvp": lambda net, x: torch.func.jvp(lambda z: net.fc(z).tanh(), (x,), (torch.ones_like(x),))[1],
    "hessian": lambda net, x: torch.func.vmap(torch.func.hessian(lambda z: net.fc(z).tanh().sum()))(x),
    "forces": lambda net, x: torch.autograd.grad(net.fc(x).tanh().sum(), x, create_graph=True)[0],
}


@pytest.mark.parametrize("name", FUNCTION_TRANSFORMS)
def test_derivatives_inside_forward_pass(name):
    assert_passes(judge(Wrapped(FUNCTION_TRANSFORMS[name], fc=linear()), X))


def inner_steps(net: Wrapped, x: Tensor, create_graph: bool) -> Tensor:
    weight = net.fc.weight
    for _ in range(3):
        loss = F.linear(x, weight).pow(2).mean()
        (slope,) = torch.autograd.grad(loss, weight, retain_graph=True, create_graph=create_graph)
        weight = weight - 0.1 * slope
    return F.linear(x, weight).tanh()


@pytest.mark.parametrize("create_graph", [False, True], ids=["first order", "second order"])
def test_inner_training_steps_pass(create_graph):
    model = Wrapped(lambda net, x: inner_steps(net, x, create_graph), fc=linear())
    model.fc.bias = None
    assert_passes(judge(model, X))


LINEAR_ALGEBRA: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda a: torch.linalg.solve(a @ a.mT + torch.eye(4), a),
    "eigenvalues": lambda a: torch.linalg.eigvalsh(a @ a.mT),
    "eigenvectors": lambda a: torch.linalg.eigh(a @ a.mT)[1].abs(),
    "singular values": torch.linalg.svdvals,
    "qr": lambda a: torch.linalg.qr(a)[0].abs(),
    "cholesky": lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(4)),
    "exponential": torch.matrix_exp,
    "determinant": lambda a: torch.linalg.slogdet(a)[1],
}


@pytest.mark.parametrize("name", LINEAR_ALGEBRA)
def test_linear_algebra_passes(name):
    assert_passes(judge(LINEAR_ALGEBRA[name], SQUARE))


def spectrogram(net: Wrapped, x: Tensor) -> Tensor:
    return torch.stft(net.fc(x), 8, window=torch.hann_window(8), return_complex=True).abs()


def test_a_spectrogram_passes():
    assert_passes(judge(Wrapped(spectrogram, fc=linear(4, 32)), X))


def test_complex_parameters_pass():
    torch.manual_seed(0)
    model = Wrapped(lambda net, x: (x.to(torch.complex64) @ net.weight).abs())
    model.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    assert_passes(judge(model, X))


@dataclasses.dataclass
class Record:
    x: Tensor
    more: dict[str, Any]


Pair = collections.namedtuple("Pair", "x more")


@pytest.mark.parametrize("kind", [Record, Pair])
def test_nested_inputs_and_outputs_pass(kind):
    model = Wrapped(lambda net, given: kind(net.fc(given.x), {"scale": [2 * given.more["scale"]]}), fc=linear())
    assert_passes(judge(model, kind(X, {"scale": X[0]})))


def test_tied_parameters_seen_in_two_shapes_pass():
    torch.manual_seed(0)
    model = Wrapped(lambda net, i: net.embedding(i).tanh() @ net.out, embedding=nn.Embedding(7, 4))
    model.out = nn.Parameter(torch.empty(4, 7))
    model.out.data = model.embedding.weight.data.t()
    assert_passes(judge(model, torch.tensor([[0, 3], [6, 3]])))


def test_views_of_one_tensor_as_two_inputs_pass():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    model = Wrapped(lambda net, left, right: net.fc(left) * net.fc(right), fc=linear())
    assert_passes(judge(model, x[:, :4], x[:, 2:6]))


STARTS = {
    "everything zero": lambda net: [parameter.data.zero_() for parameter in net.parameters()],
    "dead": lambda net: net[0].bias.data.fill_(-100),
    "saturated": lambda net: net[0].weight.data.mul_(1e3),
    "tiny": lambda net: net[2].weight.data.mul_(1e-20),
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", STARTS)
def test_an_extreme_start_passes(name, activation):
    model = nn.Sequential(linear(4, 5), activation(), linear(5, 2))
    STARTS[name](model)
    assert_passes(judge(model, X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_pass(dtype):
    model = nn.Sequential(linear(4, 5), nn.LayerNorm(5), nn.GELU(), linear(5, 2)).to(dtype)
    assert_passes(judge(model, X.to(dtype)))


def test_equal_inputs_before_a_normalisation_pass():
    assert_passes(judge(nn.Sequential(nn.LayerNorm(4), linear()), torch.ones(5, 4)))


def test_a_batch_norm_over_a_batch_of_two_passes():
    assert_passes(judge(nn.Sequential(linear(), nn.BatchNorm1d(3), linear(3, 2)).train(), X[:2]))
