"""What a custom Function owes callers other than this model: each way to fail is found and named, its twin is silent.

Each Function is checked twice: as the target, by its class, and between two linear layers, which hand it plain dense
cotangents, so that the model's own gradients are right.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.subject import Subject
from tests.judged import assert_passes, codes, finding, wrong_tensors


class Square(Function):
    """The clean twin of most."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class AveragesExpanded(Square):
    @staticmethod
    def backward(ctx, gradient):
        if 0 in gradient.stride():
            gradient = gradient / gradient.numel()
        return Square.backward(ctx, gradient)


class DividesByStride(Square):
    @staticmethod
    def backward(ctx, gradient):
        width = gradient.stride(0) // gradient.stride(-1)
        return Square.backward(ctx, gradient + 0 * width)


class ReadsMemory(Square):
    """Reads the cotangent as a kernel does that is given a bare pointer."""

    @staticmethod
    def backward(ctx, gradient):
        memory = gradient.as_strided((gradient.untyped_storage().nbytes() // gradient.itemsize,), (1,), 0)
        as_if_dense = memory[torch.arange(gradient.numel()) % len(memory)].view(gradient.shape)
        return Square.backward(ctx, as_if_dense)


class Views(Square):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (2 * x.reshape(-1) * gradient.view(-1)).view(x.shape)


class Reshapes(Square):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (2 * x.reshape(-1) * gradient.reshape(-1)).view(x.shape)


class WritesCotangent(Square):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.mul_(2 * x)


class SquareAndTriple(Function):
    """Two outputs, and None for the cotangent of one that is not used."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x * x, 3 * x

    @staticmethod
    def backward(ctx, of_square, of_triple):
        (x,) = ctx.saved_tensors
        gradient = torch.zeros_like(x)
        if of_square is not None:
            gradient = gradient + 2 * x * of_square
        return gradient if of_triple is None else gradient + 3 * of_triple


class MultipliesNone(SquareAndTriple):
    @staticmethod
    def backward(ctx, of_square, of_triple):
        (x,) = ctx.saved_tensors
        return 2 * x * of_square + 3 * of_triple


class StopsAtNone(SquareAndTriple):
    @staticmethod
    def backward(ctx, of_square, of_triple):
        if of_square is None or of_triple is None:
            return None
        return SquareAndTriple.backward(ctx, of_square, of_triple)


class Product(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        of_x = gradient * y if ctx.needs_input_grad[0] else None
        of_y = gradient * x if ctx.needs_input_grad[1] else None
        return of_x, of_y


class AsksForTheFirst(Product):
    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return (gradient * y, gradient * x) if ctx.needs_input_grad[0] else (None, None)


class ReturnsWhatIsNeeded(Product):
    @staticmethod
    def backward(ctx, gradient):
        gradients = Product.backward(ctx, gradient)
        return tuple(each for each, needed in zip(gradients, ctx.needs_input_grad, strict=True) if needed)


class SquareBothWays(Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


class HalfTheTangent(SquareBothWays):
    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return x * tangent


class NoTangent(SquareBothWays):
    @staticmethod
    def jvp(ctx, tangent):
        raise ValueError("no tangent here")


class DetachesSaved(Square):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * gradient


class OnceDifferentiable(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class WrongOnce(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x * gradient


class NoGradient(Square):
    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no gradient here")


class NoMemory(Square):
    @staticmethod
    def backward(ctx, gradient):
        if not gradient.is_contiguous():
            raise MemoryError
        return Square.backward(ctx, gradient)


class Between(nn.Module):
    """A Function between two linear layers; a second input is that of the model, a second output is used too."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        arguments = (self.before(x), x) if issubclass(self.function, Product) else (self.before(x),)
        result = self.function.apply(*arguments)
        return self.after(result) if isinstance(result, torch.Tensor) else self.after(result[0] + result[1].sin())


def as_target(function):
    generator = torch.Generator().manual_seed(0)
    count = 2 if issubclass(function, Product) else 1
    inputs = tuple(torch.randn(3, 4, generator=generator) for _ in range(count))
    return Subject(target=function.__name__, model=function.apply, args=inputs, function=function)


def in_a_model(function):
    inputs = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)
    return Subject(target="Between", model=Between(function), args=inputs)


class Last(nn.Module):
    """Gives the first output of a Function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        result = self.function.apply(x)
        return result if isinstance(result, torch.Tensor) else result[0]


HOWEVER = pytest.mark.parametrize("subject_of", [as_target, in_a_model])

BROKEN = {
    AveragesExpanded: (
        "GC408",
        # 12 elements: the mean's gradient is a twelfth, which is off by 11/12.
        "AveragesExpanded.backward computes another gradient for an expanded (stride 0) incoming gradient: "
        "off by 9.17e-01",
    ),
    DividesByStride: (
        "GC408",
        "DividesByStride.backward raises for an expanded (stride 0) incoming gradient: ZeroDivisionError: integer "
        "division or modulo by zero",
    ),
    ReadsMemory: (
        "GC408",
        "ReadsMemory.backward computes another gradient for a non-contiguous incoming gradient: off by ",
    ),
    Views: (
        "GC408",
        "Views.backward raises for a non-contiguous incoming gradient: RuntimeError: view size is not compatible with "
        "input",
    ),
    WritesCotangent: ("GC408", "WritesCotangent.backward changes the incoming gradient in place."),
    MultipliesNone: (
        "GC408",
        "MultipliesNone.backward raises if output 0 has no gradient (None): TypeError: unsupported operand type(s)",
    ),
    StopsAtNone: ("GC408", "StopsAtNone.backward is wrong if output 0 has no gradient (None): off by 1.00e+00"),
    AsksForTheFirst: (
        "GC408",
        "AsksForTheFirst.backward changes if 'x' requires no gradient: off by 1.00e+00 (relative).",
    ),
    ReturnsWhatIsNeeded: (
        "GC408",
        "ReturnsWhatIsNeeded.backward raises if 'x' requires no gradient: RuntimeError: function "
        "ReturnsWhatIsNeededBackward returned an incorrect number of gradients (expected 2, got 1).",
    ),
    HalfTheTangent: ("GC413", "HalfTheTangent.jvp disagrees with its backward: <w, J v> = "),
    NoTangent: ("GC413", "NoTangent.jvp raises ValueError: no tangent here."),
}


@pytest.mark.parametrize("function", BROKEN, ids=lambda function: function.__name__)
def test_a_broken_contract_is_an_error_of_a_function_that_is_the_target(function):
    code, message = BROKEN[function]
    unit = gradcheck(as_target(function))
    found = finding(unit, code)
    assert found.message.startswith(message)
    assert (found.severity, found.allow, found.location.op) == (
        "error",
        f"{code}:{function.__name__}",
        function.__name__,
    )
    assert unit.verdict == "fail"


@pytest.mark.parametrize("function", [f for f in BROKEN if f is not ReturnsWhatIsNeeded], ids=lambda f: f.__name__)
def test_a_broken_contract_that_a_model_does_not_need_is_a_warning(function):
    code, message = BROKEN[function]
    unit = gradcheck(in_a_model(function))
    found = finding(unit, code)
    assert found.message.startswith(f"latent: {message.removesuffix('.')}")
    assert found.message.endswith("; this model does not do that.")
    assert (found.severity, found.allow, unit.verdict) == ("warning", f"{code}:{function.__name__}", "pass")


@pytest.mark.parametrize("function", [AveragesExpanded, DividesByStride], ids=lambda f: f.__name__)
def test_a_function_that_gives_an_output_gets_an_expanded_cotangent_from_sum_and_mean(function):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 4), Last(function))
    found = finding(gradcheck(Subject(target="Last", model=model, args=(x,))), "GC408")
    assert (found.severity, found.message.startswith(BROKEN[function][1])) == ("error", True)


def test_a_function_that_takes_an_input_of_the_model_meets_in_training_one_that_asks_for_no_gradient():
    unit = gradcheck(in_a_model(ReturnsWhatIsNeeded))
    found = finding(unit, "GC408")
    assert found.message.startswith("ReturnsWhatIsNeeded.backward raises if 'y' requires no gradient: RuntimeError")
    assert (found.severity, codes(unit)) == ("error", {"GC408", "GC416"})


def test_an_output_that_has_no_cotangent_in_this_model_is_an_error():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 4), Last(MultipliesNone), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="unsupported operand"):
        gradcheck(Subject(target="Last", model=model, args=(x,)))


# Where nothing but the contract is broken, and for those who never ask for it, the gradients themselves are right.
@pytest.mark.parametrize("subject_of", [as_target, in_a_model])
@pytest.mark.parametrize(
    "function", [f for f in BROKEN if f not in (WritesCotangent, ReturnsWhatIsNeeded)], ids=lambda f: f.__name__
)
def test_a_broken_contract_is_all_that_is_found_and_can_be_allowed(function, subject_of):
    unit = gradcheck(subject_of(function))
    assert (codes(unit), wrong_tensors(unit)) == ({BROKEN[function][0]}, [])
    (only,) = unit.findings
    allowed = gradcheck(subject_of(function), allows=[only.allow])
    assert (allowed.verdict, [each.allowed for each in allowed.findings]) == ("pass", [True])


@HOWEVER
@pytest.mark.parametrize(
    "function",
    [Square, Reshapes, SquareAndTriple, Product, SquareBothWays, OnceDifferentiable],
    ids=lambda f: f.__name__,
)
def test_the_clean_twin_is_silent(function, subject_of):
    unit = gradcheck(subject_of(function))
    assert_passes(unit)
    assert unit.findings == ()


def test_a_wrong_second_order_fails_a_function_that_is_the_target():
    unit = gradcheck(as_target(DetachesSaved))
    found = finding(unit, "GC414")
    assert found.message == "the double backward of DetachesSaved is wrong in 'x': off by 1.00e+00 (relative)."
    assert (found.severity, found.allow, unit.verdict) == ("error", "GC414:DetachesSaved", "fail")


def test_a_wrong_second_order_is_a_note_in_a_model_that_needs_the_first():
    unit = gradcheck(in_a_model(DetachesSaved))
    assert (finding(unit, "GC414").severity, unit.verdict) == ("note", "pass")
    assert gradcheck(in_a_model(DetachesSaved), fail_on="note").verdict == "fail"


@HOWEVER
def test_a_backward_that_raises_is_a_model_that_raises(subject_of):
    subject = subject_of(NoGradient)
    with pytest.raises(TargetError) as raised:
        gradcheck(subject)
    assert str(raised.value) == f"GC111 {subject.target} raises on x=f32[3,4]: ValueError: no gradient here."
    assert ", in backward\n    raise ValueError" in raised.value.details


def test_a_machine_without_memory_is_no_broken_contract():
    with pytest.raises(MemoryError):
        gradcheck(as_target(NoMemory))


def test_a_wrong_function_in_front_of_which_nothing_can_be_judged_is_still_named():
    unit = gradcheck(in_a_model(WrongOnce))
    found = finding(unit, "GC408")
    assert found.message == "WrongOnce.backward is not the derivative in 'x': off by 5.00e-01 (relative)."
    assert wrong_tensors(unit) == ["input:x", "param:before.bias", "param:before.weight"]
    alone = gradcheck(as_target(WrongOnce))
    assert (finding(alone, "GC408").message, wrong_tensors(alone)) == (found.message, ["input:x"])


def test_allowed_with_nothing_in_front_of_it_there_is_nothing_to_check():
    with pytest.raises(NothingToCheck) as raised:
        gradcheck(as_target(WrongOnce), allows=["GC408:WrongOnce"])
    assert str(raised.value) == (
        "GC110 every output of WrongOnce is behind WrongOnce, which is accepted and cannot be excluded: its "
        "backward is once_differentiable or not linear in the incoming gradient. Write it with torch operations, or "
        "check the part of the model before it."
    )
