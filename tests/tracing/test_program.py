"""What is seen and held fixed: each kind of cut replays the value of the point, everything else moves."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl.tracing.recorder import Recorder
from gradctl.tracing.recording import BranchChanged

AT, BESIDE = torch.tensor([0.3, -0.7, 1.1]), torch.tensor([0.4, -0.9, 1.0])


def record_and_replay(function, at: Tensor = AT, beside: Tensor = BESIDE) -> tuple[Tensor, Recorder]:
    """Return the value beside the point with what was recorded at it held fixed."""
    program = Recorder()
    with program:
        function(at.clone().requires_grad_())
    with Recorder(program.recording):
        return function(beside.clone().requires_grad_()).detach(), program


def in_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (2 * x).exp()
    return scale * x


@torch.no_grad()
def scale_of(x: Tensor) -> Tensor:
    return (2 * x).exp()


CUTS = {
    "detach": lambda x: (2 * x).detach().exp() * x,
    "data": lambda x: (2 * x).data.exp() * x,
    "no_grad block": in_no_grad,
    "no_grad decorator": lambda x: scale_of(x) * x,
    "new tensor": lambda x: torch.tensor((2 * x).tolist()).exp() * x,
    "numpy": lambda x: torch.from_numpy((2 * x).detach().numpy().copy()).exp() * x,
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_keeps_the_value_of_the_point(name):
    value, program = record_and_replay(CUTS[name])
    torch.testing.assert_close(value, (2 * AT).exp() * BESIDE)
    assert any(cut.moves for cut in program.recording.cuts.values())


@pytest.mark.parametrize("number", [lambda x: x.max().item(), lambda x: float(x.max())], ids=["item", "float"])
def test_a_python_number_keeps_the_value_of_the_point(number):
    value, _ = record_and_replay(lambda x: x / number(x))
    torch.testing.assert_close(value, BESIDE / 1.1)


def test_straight_through_by_detach_moves_as_the_identity():
    value, _ = record_and_replay(lambda x: x + (x.round() - x).detach())
    torch.testing.assert_close(value, BESIDE + AT.round() - AT)


def test_what_has_a_gradient_moves():
    value, program = record_and_replay(lambda x: x.sin() * x.as_subclass(Tensor))
    torch.testing.assert_close(value, BESIDE.sin() * BESIDE)
    assert not program.recording.cuts


def test_a_cut_that_never_moves_is_not_worth_a_note():
    value, program = record_and_replay(lambda x: x * torch.ones_like(x))
    torch.testing.assert_close(value, BESIDE)
    assert [cut.moves for cut in program.recording.cuts.values()] == [False]


def test_random_numbers_are_drawn_all_the_same():
    def noisy(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        first = torch.randn_like(x)
        return x * first * torch.rand(3)

    torch.manual_seed(0)
    expected = BESIDE * torch.randn(3) * torch.rand(3)
    torch.testing.assert_close(record_and_replay(noisy)[0], expected)


def test_a_weight_changed_behind_autograd_keeps_its_change():
    def clamped(x: Tensor) -> Tensor:
        x.data.clamp_(min=0)
        return x * 2

    torch.testing.assert_close(record_and_replay(clamped)[0], 2 * (BESIDE + AT.clamp(min=0) - AT))


def test_a_buffer_overwritten_under_no_grad_keeps_the_value_of_the_point():
    def with_buffer(x: Tensor) -> Tensor:
        buffer = torch.zeros(3)
        with torch.no_grad():
            buffer.copy_(x)
        return x * buffer

    torch.testing.assert_close(record_and_replay(with_buffer)[0], BESIDE * AT)


def test_another_call_at_the_place_of_a_cut_means_that_a_branch_changed():
    def branching(x: Tensor) -> Tensor:
        return x * (x.detach() if x[0] < 0.35 else x.data)

    with pytest.raises(BranchChanged):
        record_and_replay(branching)


def test_the_padding_row_of_an_embedding_is_held_fixed_and_the_others_move():
    def looked_up(weight: Tensor) -> Tensor:
        return F.embedding(torch.tensor([0, 2, 1]), weight, padding_idx=1)

    at, beside = torch.arange(6.0).reshape(3, 2), torch.arange(6.0).reshape(3, 2) + 10
    value, _ = record_and_replay(looked_up, at, beside)
    assert value.tolist() == [[10.0, 11.0], [14.0, 15.0], [2.0, 3.0]]


def test_fake_quantisation_moves_as_its_clamp():
    def quantised(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -1, 1)

    at, beside = torch.tensor([0.3, 5.0]), torch.tensor([0.31, 5.1])
    torch.testing.assert_close(record_and_replay(quantised, at, beside)[0], torch.tensor([0.51, 0.5]))


def test_hooks_are_not_registered_and_noted_with_their_place():
    program = Recorder()
    x = AT.clone().requires_grad_()
    with program:
        y = 2 * x
        y.register_hook(lambda gradient: 100 * gradient).remove()
        y.register_hook(lambda gradient: 100 * gradient)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0, 2.0]
    assert [place and place[0] for place in program.recording.hooks] == [__file__, __file__]


def test_cuts_know_their_line():
    program = Recorder()
    with program:
        AT.clone().requires_grad_().mul(2).detach()
    (cut,) = program.recording.cuts.values()
    assert cut.place is not None and cut.place[0] == __file__


def test_vmap_and_func_transforms_are_left_alone():
    model = nn.Linear(3, 2)

    def per_sample(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: model(row).sin().sum()))(x.expand(2, 3))

    value, program = record_and_replay(per_sample)
    torch.testing.assert_close(value, per_sample(BESIDE))
    assert not program.recording.cuts
