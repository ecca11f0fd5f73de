"""The float64 oracle: casts turned, factories widened, random streams kept, islands named, gradients as good."""

import pytest
import torch
from torch import Tensor, nn

from gradctl.tracing.promotion import Promotion, default_dtype

F64 = torch.float64


def promoted(function, *args: Tensor) -> tuple[Tensor, Promotion]:
    mode = Promotion(torch.float32)
    with default_dtype(F64), mode:
        return function(*args), mode


CASTS = {
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "half": lambda x: x.half(),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.ones(1, dtype=torch.float32)),
    "sum dtype": lambda x: x.sum(dtype=torch.float32),
    "softmax dtype": lambda x: torch.softmax(x, 0, dtype=torch.float32),
    "zeros": lambda x: torch.zeros(3) + x,
    "full like": lambda x: torch.full_like(x, 0.1, dtype=torch.float32) * x,
    "tensor": lambda x: torch.tensor([0.5, 1.5, 2.5], dtype=torch.float32) * x,
    "from numpy": lambda x: torch.from_numpy(__import__("numpy").ones(3, "float32")) * x,
    "float8": lambda x: x.to(torch.float8_e4m3fn).to(torch.float32),
    "module": lambda x: nn.RMSNorm(3, dtype=torch.float32)(x.float()),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_inside_the_program_becomes_float64(name):
    value, mode = promoted(CASTS[name], torch.tensor([0.1, 0.2, 1 / 3], dtype=F64))
    assert value.dtype == F64
    assert not mode.islands


def test_a_cast_loses_nothing():
    third = torch.tensor([1 / 3], dtype=F64)
    value, _ = promoted(lambda x: x.half().bfloat16().float(), third)
    assert value.item() == 1 / 3


def test_the_backward_of_a_cast_loses_nothing():
    x = torch.tensor([1 / 3], dtype=F64, requires_grad=True)
    with default_dtype(F64), Promotion(torch.float32):
        (x.float() ** 2).sum().backward()
    assert x.grad is not None and x.grad.item() == 2 / 3


def test_a_float32_leaf_made_inside_does_not_break_the_backward():
    def with_leaf(x: Tensor) -> Tensor:
        return x * torch.tensor([2.0], dtype=torch.float32, requires_grad=True)

    x = torch.tensor([1 / 3], dtype=F64, requires_grad=True)
    with default_dtype(F64), Promotion(torch.float32):
        with_leaf(x).sum().backward()
    assert x.grad is not None and x.grad.item() == 2.0


RANDOM = {
    "rand": lambda x: torch.rand(7),
    "randn float64": lambda x: torch.randn(7, dtype=torch.float64),
    "rand_like": torch.rand_like,
    "dropout": lambda x: nn.functional.dropout(x, 0.4, training=True),
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1)),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "multinomial": lambda x: x[torch.multinomial(x.abs(), 3)],
    "randperm": lambda x: x[torch.randperm(7)],
    "normal": lambda x: torch.normal(x, 2.0),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_draw_what_they_draw_in_float32(name):
    x = torch.linspace(-1, 1, 7)
    torch.manual_seed(0)
    native = RANDOM[name](x)
    torch.manual_seed(0)
    value, _ = promoted(RANDOM[name], x.double())
    torch.testing.assert_close(value.float(), native.float(), rtol=1e-6, atol=1e-6)


def test_an_operator_without_a_float64_kernel_is_an_island():
    @torch.library.custom_op("gradctl_tests::only_float32", mutates_args=())
    def only_float32(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("\"only_float32\" not implemented for 'Double'")
        return x * 2

    value, mode = promoted(torch.ops.gradctl_tests.only_float32, torch.ones(2, dtype=F64))
    assert value.dtype == F64 and value.tolist() == [2.0, 2.0]
    assert list(mode.islands) == ["gradctl_tests.only_float32.default"]


@pytest.mark.parametrize("shapes", [((6, 4), (2, 4, 5)), ((2, 3, 4), (4, 6)), ((4, 6), (6, 5))], ids=str)
def test_grouped_products_are_computed_in_float64(shapes):
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no _grouped_mm")
    torch.manual_seed(0)
    left, right = (torch.randn(shape, dtype=F64) for shape in shapes)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    value, mode = promoted(lambda a, b: torch.ops.aten._grouped_mm(a, b, ends), left, right)
    if left.dim() == 2 and right.dim() == 3:
        expected = torch.cat([left[:2] @ right[0], left[2:] @ right[1]])
    elif left.dim() == 3:
        expected = torch.cat([left[0] @ right[:, :2], left[1] @ right[:, 2:]], dim=1)
    else:
        expected = torch.stack([left[:, :2] @ right[:2], left[:, 2:] @ right[2:]])
    torch.testing.assert_close(value, expected)
    assert not mode.islands
