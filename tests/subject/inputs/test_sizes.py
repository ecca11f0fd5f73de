"""Sizes: the axes they are found at, the combinations of them, the inputs made, and their layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.inputs.sizes import combinations, parse_sizes, resize, sized_subjects, sum_over_first_axis
from gradctl.subject.loading.load import load_subject, make_subject


def attend(x, mask, weight):
    return torch.where(mask[..., None], x, 0) @ weight


@pytest.fixture
def subject():
    torch.manual_seed(0)
    return make_subject(attend, (torch.randn(3, 4, 5), torch.rand(3, 4) > 0.3, torch.randn(5, 5)))


def sized(subject, text, **options):
    return dict(sized_subjects(subject, parse_sizes(text), **options))


def shapes(subject):
    return [tuple(value.shape) for value in subject.args]


# The text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch=1,2; seq@x:1=17,1", ["batch=1,2", "seq@x:1=1,17"]),
        ("seq@x:1,mask:1=7", ["seq@x:1,mask:1=7"]),
        (" x:0 = 1, 2 ;", ["x:0=1,2"]),
        ("input:batch.x:0=2", ["batch.x:0=2"]),
        ("seq@input:1=3; input:0=2", ["seq@input:1=3", "input:0=2"]),  # as torch's own modules call their input
        ("input:input:2=4", ["input:2=4"]),
        ("batch=2,2", ["batch=2"]),
    ],
)
def test_sizes_are_parsed(text, expected):
    assert [str(size) for size in parse_sizes(text)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has no sizes. Write, for example, 'batch=1,2,7'."),
        (
            "batch",
            "'batch' is not NAME=N,N or INPUT:AXIS=N,N. Write, for example, 'batch=1,2,7; seq@x:1=1,17'.",
        ),
        (
            "batch=1;seq=a",
            "'seq=a' is not NAME=N,N or INPUT:AXIS=N,N. Write, for example, 'batch=1,2,7; seq@x:1=1,17'.",
        ),
        ("batch=0,1", "'batch=0,1' has the size 0; the smallest is 1."),
        ("batch=1; batch=2", "size 'batch' is given twice in 'batch=1; batch=2'; give it once."),
        ("a@x:0=1; x:0=2", "axis 'x:0' is given twice in 'a@x:0=1; x:0=2'; give it once."),
    ],
)
def test_a_text_that_is_not_sizes_is_one_sentence(text, message):
    with pytest.raises(ValueError) as caught:
        parse_sizes(text)
    assert str(caught.value) == message


# Combinations


def test_few_combinations_are_all_tried_the_smallest_first():
    assert combinations([(1, 2, 7), (1, 17)], 12, 0) == [(1, 1), (2, 1), (7, 1), (1, 17), (2, 17), (7, 17)]


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_has_the_smallest_the_largest_and_each_value(seed):
    values = [(1, 2, 3, 4, 5), (1, 17, 128), (8, 16)]
    chosen = combinations(values, 12, seed)
    assert len(chosen) == len(set(chosen)) == 12
    assert {(1, 1, 8), (5, 128, 16)} < set(chosen)
    assert [set(column) for column in zip(*chosen, strict=True)] == [set(each) for each in values]
    assert chosen == combinations(values, 12, seed)


def test_a_sample_has_nearly_all_pairs_of_values():
    values = [(1, 2, 3)] * 4
    chosen = combinations(values, 12, 0)
    pairs = {pair for each in chosen for pair in itertools.combinations(enumerate(each), 2)}
    assert len(pairs) >= 0.9 * 6 * 9


def test_a_small_limit_is_kept():
    chosen = combinations([range(1, 21)], 4, 0)
    assert len(chosen) == 4
    assert chosen[0] == (1,)
    assert chosen[-1] == (20,)


# Inputs


def test_batch_is_the_first_axis_of_all_that_share_it(subject):
    found = sized(subject, "batch=1,7")
    assert shapes(found["batch=1"]) == [(1, 4, 5), (1, 4), (5, 5)]
    assert shapes(found["batch=7"]) == [(7, 4, 5), (7, 4), (5, 5)]
    assert found["batch=7"].args[2] is subject.args[2]


def test_a_size_may_have_axes_of_several_inputs(subject):
    found = sized(subject, "batch=2; seq@x:1,mask:1=9")
    assert shapes(found["batch=2, seq=9"]) == [(2, 9, 5), (2, 9), (5, 5)]


def test_the_example_at_its_own_size_has_its_own_values(subject):
    assert all(map(torch.equal, sized(subject, "batch=3")["batch=3"].args, subject.args))


def test_one_tensor_given_twice_stays_one():
    x = torch.randn(3, 4)
    found = sized(make_subject(torch.add, (x, x)), "batch=5")["batch=5"]
    assert found.args[0] is found.args[1]


def test_a_nested_input_is_resized_by_its_path():
    subject = make_subject(lambda batch: batch["x"].sin(), ({"x": torch.randn(3, 4), "n": 3},))
    assert sized(subject, "batch.x:1=6")["batch.x:1=6"].args[0]["x"].shape == (3, 6)


@pytest.mark.parametrize(
    ("tensor", "is_legal"),
    [
        (torch.tensor([3, 5, 9]), lambda t: set(t.tolist()) <= {3, 5, 9}),
        (torch.tensor([1, 1, 0]), lambda t: t[:5].tolist() == [1, 1, 0, 1, 1]),
        (torch.tensor([1.0, 0.0, 1.0]), lambda t: t[:5].tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]),
        (torch.tensor([True, False, True]), lambda t: t[:5].tolist() == [True, False, True, True, False]),
        (torch.tensor([0.2, 0.9, 0.4]), lambda t: bool(((t >= 0.2) & (t <= 0.9)).all())),
        (torch.tensor([-3.0, 4.0, 5.0]), lambda t: 2 < float(t.square().mean().sqrt()) < 8),
        (torch.tensor([0.0, -torch.inf, 0.0]), lambda t: t[:4].tolist() == [0.0, -torch.inf, 0.0, 0.0]),
        (torch.tensor([-0.5, torch.nan]), lambda t: t.isnan().nonzero().flatten().tolist() == list(range(1, 50, 2))),
        (torch.randn(3, dtype=torch.complex64), lambda t: len(set(t.tolist())) == 50),
        (torch.ones(3), lambda t: bool((t == 1).all())),
    ],
    ids=[
        "integers",
        "integer mask",
        "float mask",
        "mask",
        "probabilities",
        "floats",
        "additive mask",
        "with NaN",
        "complex",
        "constant",
    ],
)
def test_values_at_another_size_are_like_those_of_the_example(tensor, is_legal):
    larger = resize(tensor, (50,), torch.Generator().manual_seed(0))
    assert larger.shape == (50,)
    assert larger.dtype == tensor.dtype
    assert is_legal(larger)


def test_floats_are_drawn_anew_without_ties():
    larger = resize(torch.randn(3, 4), (40, 4), torch.Generator().manual_seed(0))
    assert len(set(larger.reshape(-1).tolist())) == 160


def test_a_function_beside_the_target_is_asked_for_each_size(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\n"
        "def net(x, lengths): return x.cumsum(1) * (torch.arange(x.shape[1]) < lengths[:, None])\n"
        "def example_inputs(batch=2, seq=5):\n"
        "    if seq == 13: raise ValueError('unlucky')\n"
        "    return torch.randn(batch, seq), torch.full((batch,), seq)\n"
    )
    subject = load_subject(TargetOptions(f"{file}:net"))
    found = sized(subject, "batch=3; seq=4,13")
    assert shapes(found["batch=3, seq=4"]) == [(3, 4), (3,)]
    assert found["batch=3, seq=4"].args[1].tolist() == [4, 4, 4]
    assert str(found["batch=3, seq=13"]) == "GC104 example_inputs() raised ValueError: unlucky."


def test_inputs_of_the_command_line_are_resized_and_not_those_of_the_function(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("def net(x): return x.sin()\ndef net_inputs(batch=2): raise AssertionError\n")
    subject = load_subject(TargetOptions(f"{file}:net", input_specs=("x=f32[2,3]",)))
    assert shapes(sized(subject, "batch=4")["batch=4"]) == [(4, 3)]


# Layouts


def test_each_layout_occurs_once_at_the_smallest_sizes_above_one(subject):
    found = sized(subject, "batch=1,2,6")
    assert list(found) == [
        "batch=1",
        "batch=2",
        "batch=2, transposed",
        "batch=2, offset storage",
        "batch=6",
        "batch=6, strided",
        "batch=6, expanded cotangent",
    ]
    made = {name.partition(", ")[2]: each.args[0] for name, each in found.items()}
    assert made["transposed"].stride() == (20, 1, 4)
    assert made["strided"].stride() == (40, 10, 2)
    assert made["offset storage"].storage_offset() == 1
    assert torch.equal(made["transposed"], found["batch=2"].args[0])
    assert torch.equal(made["offset storage"], found["batch=2"].args[0])
    assert torch.equal(made["strided"], found["batch=6"].args[0])


def test_the_sum_over_the_first_axis_leaves_out_infinite_elements():
    x = torch.randn(3, 4, requires_grad=True)
    total = sum_over_first_axis(x.masked_fill(torch.eye(3, 4).bool(), -torch.inf))
    total.backward()
    assert total.isfinite()
    assert (x.grad == 0).tolist() == torch.eye(3, 4).bool().tolist()


def test_a_loss_of_the_user_leaves_out_the_expanded_cotangent():
    subject = make_subject(torch.sin, (torch.randn(3, 4),), loss=torch.sum)
    assert "batch=3, expanded cotangent" not in sized(subject, "batch=3")


def test_the_sum_over_the_first_axis_gives_an_expanded_cotangent():
    seen = []
    y = torch.randn(3, 4, requires_grad=True).sin()
    y.register_hook(seen.append)
    sum_over_first_axis({"y": y, "n": 3, "sparse": torch.eye(2).to_sparse()}).backward()
    assert seen[0].stride()[0] == 0
    assert len(set(seen[0][0].tolist())) == 4


# Refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch=1,2; seq=1,17",
            "GC128 --sizes: no axis has the name 'seq'. Name the axis, for example --sizes "
            "'batch=1,2; seq@x:1,mask:1=1,17', or let the function of inputs beside the target take seq=.",
        ),
        ("y:0=1", "GC104 --sizes names no input tensor 'y': x, mask, weight."),
        ("x:3=1", "GC104 --sizes x:3: 'x' is [3, 4, 5], which has no axis 3."),
        ("batch=1; x:0=2", "GC128 --sizes: axis 0 of input 'x' has two sizes, 'batch' and 'x:0'; give it one."),
    ],
)
def test_a_size_without_an_axis_is_an_error(subject, text, message):
    with pytest.raises(TargetError) as caught:
        sized_subjects(subject, parse_sizes(text))
    assert str(caught.value) == message


def test_a_model_without_tensors_has_no_sizes():
    with pytest.raises(TargetError, match="GC128 --sizes: no input is a tensor, so none has the size 'batch'"):
        sized_subjects(make_subject(nn.Linear(2, 2), (3,)), parse_sizes("batch=1"))


def test_an_empty_input_has_no_other_sizes():
    subject = make_subject(torch.sin, (torch.randn(0, 4),))
    with pytest.raises(TargetError, match=r"GC128 --sizes: an input is empty \(\[0, 4\]\), and has no other sizes"):
        list(sized_subjects(subject, parse_sizes("batch=2")))
