"""Arguments and attributes of odd kinds: expanded tensors, tuples that do not behave, modules not yet built, outputs
that are inputs.
"""

import numpy as np
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def test_a_transposed_input_passes():
    assert_passes(judge(linear(), torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).t()))


def test_an_expanded_input_passes():
    assert_passes(judge(linear(), X[:1].expand(5, 4)))


class Irreps(tuple):
    """As e3nn's: a tuple without a length."""

    def __len__(self) -> int:
        raise NotImplementedError


class Equivariant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.irreps = linear(), Irreps(("0e", "1o"))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


def test_an_attribute_that_is_a_tuple_of_its_own_kind_is_left_alone():
    assert_passes(judge(Equivariant(), X))


def test_a_lazy_module_passes_before_it_was_run_and_after():
    assert_passes(judge(nn.Sequential(nn.LazyLinear(5), nn.Tanh()), X))
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh())
    model(X)
    assert_passes(judge(model, X))


class PassesThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return self.fc(x), (factor,)


def test_an_output_that_is_an_input_is_no_cast():
    assert "GC411" not in codes(judge(PassesThrough(), X, torch.tensor([0.5, -1.0, 2.0])))


def test_a_generator_that_a_function_closes_over_is_left_as_it_was():
    generator = np.random.default_rng(0)

    def noisy(x: Tensor) -> Tensor:
        return x.tanh() * float(generator.random())

    before = generator.bit_generator.state
    judge(noisy, X)
    assert generator.bit_generator.state == before
