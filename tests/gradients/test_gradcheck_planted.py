"""Every planted mistake is found at the defaults and named; the nets it was planted in are silent without it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, finding, judge, wrong_tensors
from tests.sweeps import sampled
from tests.zoo import GRADIENT_BUGS, LINEAR_BUGS, NATIVE_BUGS, plant

# Hidden width of three square layers: 1e3, 1e4, 1e5 and 1e6 parameters.
WIDTHS = {"1e3": 17, "1e4": 57, "1e5": 182, "1e6": 577}
# One mistake of each kind at the larger sizes; all of them run at 1e3.
HARDEST = ("scale 1.001", "sign", "zeroed row", "one element doubled", "transposed")


def mlp(width: int, normalisation: type[nn.Module] = nn.Identity) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), normalisation(width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, 3)), torch.randn(4, width)


def parameter_of(bug: str) -> str:
    return f"3.{LINEAR_BUGS[bug][0]}" if bug in LINEAR_BUGS else "3.weight"


@pytest.mark.parametrize("bug", [*GRADIENT_BUGS, *LINEAR_BUGS])
def test_a_planted_mistake_is_named_and_nothing_else(bug):
    model, x = mlp(WIDTHS["1e3"])
    unit = judge(plant(model, parameter_of(bug), bug), x)
    assert unit.verdict == "fail"
    assert wrong_tensors(unit) == [f"param:{parameter_of(bug)}"]
    assert ("GC403" if bug == "none" else "GC401") in codes(unit)


@pytest.mark.parametrize("bug", NATIVE_BUGS)
def test_a_mistake_made_of_torch_operators_is_named_and_no_function_is_blamed(bug):
    model, x = mlp(WIDTHS["1e3"])
    unit = judge(plant(model, "3.weight", bug, "native"), x)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["param:3.weight"])
    assert (codes(unit), finding(unit, "GC401").cause) == ({"GC401"}, None)


@pytest.mark.parametrize(("size", "bug"), sampled(product(["1e4", "1e5"], HARDEST), 3, always=[("1e5", "scale 1.001")]))
def test_a_planted_mistake_is_named_in_a_larger_net(size, bug):
    model, x = mlp(WIDTHS[size])
    unit = judge(plant(model, "3.weight", bug), x)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["param:3.weight"])


@pytest.mark.parametrize("bug", sampled(HARDEST, always=["scale 1.001"]))
def test_a_planted_mistake_is_named_among_a_million_parameters(bug):
    model, x = mlp(WIDTHS["1e6"])
    unit = judge(plant(model, "3.weight", bug), x)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["param:3.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in [*GRADIENT_BUGS, *LINEAR_BUGS] if bug not in HARDEST])
@pytest.mark.parametrize("size", ["1e4", "1e5", "1e6"])
def test_every_other_mistake_is_named_in_larger_nets(size, bug):
    model, x = mlp(WIDTHS[size])
    unit = judge(plant(model, parameter_of(bug), bug), x)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", [f"param:{parameter_of(bug)}"])


@pytest.mark.parametrize("size", WIDTHS)
def test_the_net_without_a_mistake_is_silent(size):
    model, x = mlp(WIDTHS[size])
    assert_passes(judge(model, x))


@pytest.mark.parametrize(
    ("parameter", "bug"),
    sampled(product(["0.weight", "0.bias", "3.bias", "6.weight", "9.weight", "9.bias"], ["scale 1.001", "sign"]), 3),
)
def test_a_mistake_is_named_wherever_it_is(parameter, bug):
    model, x = mlp(WIDTHS["1e3"])
    assert wrong_tensors(judge(plant(model, parameter, bug), x)) == [f"param:{parameter}"]


@pytest.mark.parametrize(
    ("parameter", "bug"),
    sampled(
        product(["0.weight", "1.weight", "4.bias", "9.weight"], ["scale 1.1", "zeroed row", "one element doubled"]), 2
    ),
)
def test_a_mistake_beside_a_bias_that_batchnorm_removes_is_named(parameter, bug):
    if parameter.endswith(("bias", "1.weight")) and bug == "zeroed row":
        bug = "negated row"  # of a vector, a row is one element
    model, x = mlp(WIDTHS["1e3"], nn.BatchNorm1d)
    assert wrong_tensors(judge(plant(model, parameter, bug), x)) == [f"param:{parameter}"]


def test_a_bias_that_batchnorm_removes_is_silent():
    model, x = mlp(WIDTHS["1e3"], nn.BatchNorm1d)
    assert_passes(judge(model, x))


class Contrast(nn.Module):
    """The cosine of two views of the input, of which one is detached (as SimSiam and BYOL do)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.predictor = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x).tanh(), self.encoder(x.flip(1)).tanh()
        return nn.functional.cosine_similarity(self.predictor(first), second.detach())


@pytest.mark.parametrize(
    ("parameter", "bug"),
    sampled(
        product(["encoder.weight", "encoder.bias", "predictor.weight"], ["scale 1.001", "sign", "one element doubled"]),
        2,
    ),
)
def test_a_mistake_next_to_a_detach_is_named(parameter, bug):
    torch.manual_seed(0)
    unit = judge(plant(Contrast(), parameter, bug), torch.randn(5, 12))
    assert wrong_tensors(unit) == [f"param:{parameter}"]
    assert "GC404" in codes(unit)


def test_the_detach_alone_is_a_note():
    torch.manual_seed(0)
    unit = judge(Contrast(), torch.randn(5, 12))
    assert_passes(unit)
    assert "GC404" in codes(unit)


def attention_block() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)


@pytest.mark.parametrize(
    ("parameter", "bug"),
    sampled(
        product(
            ["self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "norm1.weight"],
            ["scale 1.001", "sign", "one element doubled"],
        ),
        2,
    ),
)
def test_a_mistake_inside_an_attention_block_is_named(parameter, bug):
    model, x = attention_block()
    assert wrong_tensors(judge(plant(model, parameter, bug), x)) == [f"param:{parameter}"]


def test_the_attention_block_is_silent():
    model, x = attention_block()
    assert_passes(judge(model, x))


def test_two_mistakes_are_both_named():
    model, x = mlp(WIDTHS["1e3"])
    model = plant(plant(model, "0.weight", "sign"), "6.bias", "scale 1.001")
    assert wrong_tensors(judge(model, x)) == ["param:0.weight", "param:6.bias"]


@pytest.mark.parametrize("bug", ["scale 1.001", "sign", "zeroed row", "transposed", "clipped"])
def test_a_mistake_in_a_function_is_named_by_function_and_tensor(bug):
    model, x = mlp(WIDTHS["1e3"])
    unit = judge(plant(model, "3.weight", bug, "function"), x)
    headline, spoiled = finding(unit, "GC408"), finding(unit, "GC401")
    assert (headline.severity, headline.allow) == ("error", "GC408:Planted")
    assert (spoiled.tensor, spoiled.cause) == ("param:3.weight", "GC408")


def test_an_allowed_function_hides_no_other_mistake():
    model, x = mlp(WIDTHS["1e3"])
    model = plant(plant(model, "3.weight", "sign", "function"), "0.weight", "scale 1.001")
    unit = judge(model, x, allows=["GC408:Planted"])
    assert wrong_tensors(unit) == ["param:0.weight"]


def test_an_allowed_function_is_no_failure():
    model, x = mlp(WIDTHS["1e3"])
    unit = judge(plant(model, "3.weight", "sign", "function"), x, allows=["GC408:Planted"])
    assert (unit.verdict, wrong_tensors(unit)) == ("pass", [])


@pytest.mark.parametrize("kind", ["custom op", "function"])
def test_a_gradient_that_is_none_where_there_is_a_slope_is_missing(kind):
    model, x = mlp(WIDTHS["1e3"])
    unit = judge(plant(model, "3.weight", "none", kind), x)
    assert [each.verdict for each in unit.tensors if each.tensor == "param:3.weight"] == ["missing"]
    assert finding(unit, "GC403").tensor == "param:3.weight"


def transposed_quadratic(kind: str) -> nn.Module:
    torch.manual_seed(0)
    quadratic = nn.Module()
    quadratic.weight = nn.Parameter(torch.randn(6, 6))
    return plant(Quadratic(quadratic), "inner.weight", "transposed", kind)


def test_a_symmetric_gradient_transposed_is_no_mistake():
    """Twin of ``transposed``: where the true gradient is symmetric, there is nothing to find."""
    assert_passes(judge(transposed_quadratic("native"), torch.randn(6)))


@pytest.mark.parametrize("kind", ["custom op", "function"])
def test_an_operator_is_judged_with_cotangents_that_are_not_symmetric_as_well(kind):
    unit = judge(transposed_quadratic(kind), torch.randn(6))
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", [])
    assert "those of param:inner.weight pass it" in finding(unit, "GC408").message


class Quadratic(nn.Module):
    """``xᵀ W x``, whose gradient in W is the symmetric ``x xᵀ``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight @ x
