from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradctl.core.errors import TargetError, TrustError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.inputs.example import (
    first_layer_remedy,
    given_inputs,
    input_names,
    inputs_from_beside,
    inputs_from_file,
    inputs_from_specs,
)
from gradctl.subject.inputs.proposal import no_inputs, proposed_inputs
from gradctl.subject.inputs.specification import parse_input


class TwoInputs(nn.Module):
    def forward(self, x, mask=None, *, scale=1.0):
        return x


class AnyInputs(nn.Module):
    def forward(self, first, *rest, **options):
        return first


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor=2.0, shift=0.0):
        return x * factor + shift


class ScaleWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x, factor):
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def of_specs(model, *texts, seed=0):
    return inputs_from_specs([parse_input(text) for text in texts], model, seed)


def message(call):
    with pytest.raises((TargetError, TrustError)) as caught:
        call()
    assert caught.value.exit_code == 2
    return str(caught.value)


# --input


def test_inputs_without_a_name_go_in_order():
    inputs = of_specs(TwoInputs(), "f32[2,3]", "None")
    assert [getattr(value, "shape", value) for value in inputs.args] == [(2, 3), None]
    assert inputs.kwargs == {}


def test_named_inputs_go_by_position_where_they_can():
    inputs = of_specs(TwoInputs(), "scale=2.0", "mask=True", "x=3")
    assert inputs.args == (3, True)
    assert inputs.kwargs == {"scale": 2.0}


def test_after_a_gap_inputs_go_by_keyword():
    def f(x, y=1, z=2): ...

    inputs = of_specs(f, "z=5", "x=4")
    assert (inputs.args, inputs.kwargs) == ((4,), {"z": 5})


def test_positional_only_parameters_can_be_named():
    def f(x=1, y=2, /): ...

    inputs = of_specs(f, "y=5")
    assert (inputs.args, inputs.kwargs) == ((1, 5), {})


def test_a_function_class_gets_all_by_position():
    inputs = of_specs(Scale.apply, "shift=1.0", "x=3")
    assert (inputs.args, inputs.kwargs) == ((3, 2.0, 1.0), {})
    assert of_specs(ScaleWithSetup.apply, "factor=1.0", "x=3").args == (3, 1.0)


def test_a_model_that_takes_anything_gets_anything():
    inputs = of_specs(AnyInputs(), "1", "2", "3", "more=4")
    assert (inputs.args, inputs.kwargs) == ((1, 2, 3), {"more": 4})


def test_a_builtin_gets_what_is_given():
    assert of_specs(torch.mm, "1", "2").args == (1, 2)


def test_inputs_of_one_seed_are_equal_and_each_is_drawn_anew():
    first, again, other = (of_specs(TwoInputs(), "f32[3]", "f32[3]", seed=seed).args for seed in (1, 1, 2))
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])
    assert not first[0].equal(first[1])
    assert not first[0].equal(other[0])


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    of_specs(TwoInputs(), "f32[3]")
    assert torch.rand(1).equal(expected)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["msk=None", "x=1"], "input 'msk' does not exist: forward takes x, mask, scale (did you mean 'mask'?)."),
        (["x=1", "x=2"], "input 'x' is given twice. Give it once."),
        (["1", "x=2"], "input 'x' is given twice: by name, and without one as number 1."),
        (["1", "2", "3"], "3 inputs are given by position, and forward takes x, mask."),
        (
            ["mask=None"],
            "input 'x' is missing: forward takes x, mask, scale. Add, for example, --input 'x=f32[8,8]'.",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(texts, said):
    assert message(lambda: of_specs(TwoInputs(), *texts)) == f"GC104 {said}"


def test_of_many_parameters_the_first_are_listed():
    def wide(a, b, c, d, e, f, g, h, i, j): ...

    assert message(lambda: of_specs(wide, "z=1")) == (
        "GC104 input 'z' does not exist: wide takes a, b, c, d, e, f, g, h and 2 more."
    )


def test_what_takes_nothing_says_so():
    assert message(lambda: of_specs(lambda: 0, "1")) == "GC104 1 inputs are given by position, and <lambda> takes none."


# Files


X, MASK = torch.arange(6.0).reshape(2, 3), torch.tensor([True, False])


def saved_npz(path, **arrays):
    np.savez(path, **{name: value.numpy() for name, value in arrays.items()})


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_a_file_gives_inputs_by_name(tmp_path, suffix):
    path = tmp_path / f"inputs.{suffix}"
    if suffix == "npz":
        saved_npz(path, mask=MASK, x=X)
    elif suffix == "pt":
        torch.save({"mask": MASK, "x": X}, path)
    else:
        save_file({"mask": MASK, "x": X}, path)
    inputs = inputs_from_file(path, TwoInputs())
    assert inputs.args[0].equal(X)
    assert inputs.args[1].equal(MASK)
    assert inputs.kwargs == {}


@pytest.mark.parametrize("names", [("0", "1"), ("arg_0", "arg_1"), ("arr_0", "arr_1")])
def test_a_file_gives_inputs_by_position(tmp_path, names):
    save_file({names[1]: MASK, names[0]: X}, tmp_path / "inputs.safetensors")
    inputs = inputs_from_file(tmp_path / "inputs.safetensors", TwoInputs())
    assert inputs.args[0].equal(X)
    assert inputs.args[1].equal(MASK)


def test_a_parameter_that_is_named_like_a_position_is_a_name(tmp_path):
    def f(arg_1, arg_0): ...

    save_file({"arg_0": X, "arg_1": MASK}, tmp_path / "inputs.safetensors")
    assert inputs_from_file(tmp_path / "inputs.safetensors", f).args[0].equal(MASK)


def test_a_tuple_a_list_or_a_tensor_in_a_file_goes_by_position(tmp_path):
    for content in ((X, MASK), [X, MASK]):
        torch.save(content, tmp_path / "inputs.pt")
        assert inputs_from_file(tmp_path / "inputs.pt", TwoInputs()).args[1].equal(MASK)
    torch.save(X, tmp_path / "inputs.pt")
    assert inputs_from_file(tmp_path / "inputs.pt", TwoInputs()).args[0].equal(X)


def test_nested_inputs_and_scalars_survive_a_file(tmp_path):
    torch.save({"x": {"a": [X], "n": 3}}, tmp_path / "inputs.pt")
    (x,) = inputs_from_file(tmp_path / "inputs.pt", TwoInputs()).args
    assert x["n"] == 3
    assert x["a"][0].equal(X)


def test_arrays_of_another_byte_order_or_without_dimensions_are_read(tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.array([1.0, 2.0], dtype=">f4"), mask=np.float64(3))
    x, mask = inputs_from_file(tmp_path / "inputs.npz", TwoInputs()).args
    assert x.equal(torch.tensor([1.0, 2.0]))
    assert mask.equal(torch.tensor(3.0, dtype=torch.float64))


def test_a_file_that_does_not_fit_the_model_says_what_does_not(tmp_path):
    path = tmp_path / "inputs.npz"
    saved_npz(path, x=X, msk=MASK)
    assert message(lambda: inputs_from_file(path, TwoInputs())) == (
        "GC104 input 'msk' does not exist: forward takes x, mask, scale (did you mean 'mask'?)."
    )
    saved_npz(path, arg_0=X, arg_2=MASK)
    assert message(lambda: inputs_from_file(path, TwoInputs())) == (
        f"GC104 {path} has inputs by position, and number 1 is missing. Count from 0."
    )
    torch.save(3, tmp_path / "inputs.pt")
    assert message(lambda: inputs_from_file(tmp_path / "inputs.pt", TwoInputs())) == (
        f"GC104 {tmp_path}/inputs.pt holds 'int'. Save a dict of tensors by name, a tuple, or one tensor."
    )


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    def refused(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return message(lambda: inputs_from_file(tmp_path / name, TwoInputs()))

    saved_npz(tmp_path / "inputs.npz", x=X)
    whole = (tmp_path / "inputs.npz").read_bytes()
    assert refused("input.npz") == f"GC122 there is no file '{tmp_path}/input.npz' (did you mean 'inputs.npz'?)."
    assert refused("inputs.csv", b"1,2") == (
        f"GC122 {tmp_path}/inputs.csv has an unsupported suffix; supported: .npz, .pb, .safetensors, .pt, .pth, .bin."
    )
    assert refused("inputs.npz", b"") == f"GC122 {tmp_path}/inputs.npz is empty. Write it again."
    assert refused("inputs.npz", whole[:-30]) == (
        f"GC122 {tmp_path}/inputs.npz is damaged, or no npz file (it is no zip archive). Write or copy it again."
    )
    np.savez(tmp_path / "words.npz", x=np.array(["a", "b"]))
    assert refused("words.npz") == (
        f"GC122 {tmp_path}/words.npz: 'x' is an array of <U1, which torch has no tensor for. Store numbers."
    )


def test_a_file_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.array([{}, None], dtype=object))
    assert message(lambda: inputs_from_file(tmp_path / "inputs.npz", TwoInputs())) == (
        f"GC901 {tmp_path}/inputs.npz holds pickled objects, which run code when loaded. Save tensors only: in a dict "
        "by name, with torch.save or numpy.savez."
    )
    torch.save({"x": nn.Linear(1, 1)}, tmp_path / "inputs.pt")
    assert message(lambda: inputs_from_file(tmp_path / "inputs.pt", TwoInputs())) == (
        f"GC901 {tmp_path}/inputs.pt holds pickled code (torch.nn.modules.linear.Linear), which runs when loaded. Save "
        "tensors only: in a dict by name, with torch.save or numpy.savez."
    )


# Functions beside the target


def test_a_function_beside_gives_a_tuple_a_dict_or_one_value():
    def given(value):
        inputs = inputs_from_beside("example_inputs", lambda: value, TwoInputs())
        return inputs.args, inputs.kwargs

    assert given((1, 2)) == ((1, 2), {})
    assert given({"x": 1, "scale": 2}) == ((), {"x": 1, "scale": 2})
    assert given(3) == ((3,), {})


def test_a_tuple_instead_of_a_function_is_taken_as_it_is():
    assert inputs_from_beside("example_inputs", (1, 2), TwoInputs()).args == (1, 2)


def test_a_dict_for_a_function_class_goes_by_position():
    assert inputs_from_beside("Scale_inputs", lambda: {"factor": 3.0, "x": 1}, Scale.apply).args == (1, 3.0, 0.0)


def test_a_function_beside_that_gives_a_list_or_nothing_is_told_what_to_return():
    for value, kind in (([1], "a list"), (None, "None"), ("x", "a str")):
        assert message(lambda value=value: inputs_from_beside("net_inputs", lambda: value, TwoInputs())) == (
            f"GC104 net_inputs() returns {kind}. Return a tuple of the inputs in order, a dict of keyword inputs, or "
            "one tensor."
        )


def test_a_function_beside_that_raises_shows_the_users_frames():
    def example_inputs():
        raise OSError("no data set")

    with pytest.raises(TargetError) as caught:
        inputs_from_beside("example_inputs", example_inputs, TwoInputs())
    assert str(caught.value) == "GC104 example_inputs() raised OSError: no data set."
    assert "in example_inputs\n    raise OSError" in caught.value.details
    assert "gradctl/subject" not in caught.value.details


# The line that is proposed


def embedding():
    return nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("layer", "proposed"),
    [
        (nn.Linear(784, 10), "input=f32[8,784]"),
        (nn.Linear(784, 10, dtype=torch.float64), "input=f64[8,784]"),
        (nn.Linear(784, 10, dtype=torch.bfloat16), "input=bf16[8,784]"),
        (nn.Conv1d(3, 4, 5), "input=f32[4,3,64]"),
        (nn.Conv2d(3, 4, 5), "input=f32[4,3,32,32]"),
        (nn.Conv2d(1, 4, (40, 3)), "input=f32[4,1,40,32]"),
        (nn.Conv3d(3, 4, 5), "input=f32[4,3,16,16,16]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 1)), "input=f32[8,12]"),
        (embedding(), "input=i64[8,16]@0..100"),
        (nn.GRU(5, 3), "input=f32[16,8,5]"),
        (nn.LSTM(5, 3, batch_first=True), "input=f32[8,16,5]"),
        (nn.GRUCell(5, 3), "input=f32[8,5]"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "input=f32[8,3]"),
        (nn.ReLU(), "input=f32[8,8]"),
    ],
)
def test_the_first_layer_says_what_to_type(layer, proposed):
    assert proposed_inputs(layer) == [proposed]
    if "Lazy" not in repr(layer):
        inputs = of_specs(layer, proposed)
        layer(*inputs.args, **inputs.kwargs)  # it fits


def test_each_parameter_that_is_needed_gets_an_input():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(6, 6)

        def forward(self, x, attention_mask, heads: int, causal: bool, scale=1.0):
            return x

    assert proposed_inputs(Attention()) == ["x=f32[8,6]", "attention_mask=bool[8,6]", "heads=1", "causal=True"]


def test_of_a_forward_that_needs_nothing_the_first_gets_an_input():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 4)

        def forward(self, input_ids=None, attention_mask=None):
            return self.embedding(input_ids)

    assert proposed_inputs(Optional()) == ["input_ids=i64[8,16]@0..50"]


def test_without_inputs_the_line_to_type_is_proposed():
    error = no_inputs(nn.Linear(784, 10), TargetOptions("m.py"))
    assert str(error) == (
        "GC107 m.py has no inputs. Define example_inputs() next to it, or adapt this to your data: "
        "gradctl gradcheck m.py --input 'input=f32[8,784]'."
    )


def test_the_line_repeats_what_was_given_in_quotes_where_a_shell_needs_them():
    error = no_inputs(nn.ReLU(), TargetOptions("my net.py", ("act=re lu",), command="compare"))
    assert str(error).endswith("data: gradctl compare 'my net.py' '--arg=act=re lu' --input 'input=f32[8,8]'.")


def test_for_a_function_the_other_reading_is_named_too():
    def blend(x, y): ...

    assert str(no_inputs(blend, TargetOptions("m.py:blend"))) == (
        "GC107 m.py:blend has no inputs. Define blend_inputs() next to it, or adapt this to your data: "
        "gradctl gradcheck m.py:blend --input 'x=f32[8,8]' --input 'y=f32[8,8]'. If blend returns a model, pass "
        "its arguments with --arg."
    )
    assert str(no_inputs(Scale.apply, TargetOptions("m.py:Scale"))) == (
        "GC107 m.py:Scale has no inputs. Define Scale_inputs() next to it, or adapt this to your data: "
        "gradctl gradcheck m.py:Scale --input 'x=f32[8,8]'."
    )


# Names of inputs


@dataclasses.dataclass
class Batch:
    x: object
    mask: object


class Pair(NamedTuple):
    left: int
    right: int


def test_inputs_are_named_by_the_parameters_of_forward():
    assert input_names(TwoInputs(), (1, 2), {"scale": 3}) == [("x", 1), ("mask", 2), ("scale", 3)]


def test_nested_inputs_are_named_by_their_path():
    assert input_names(TwoInputs(), ([1, {"k": 2}], Batch(3, Pair(4, 5))), {}) == [
        ("x.0", 1),
        ("x.1.k", 2),
        ("mask.x", 3),
        ("mask.mask.left", 4),
        ("mask.mask.right", 5),
    ]


def test_what_goes_into_star_args_is_numbered():
    assert input_names(AnyInputs(), (1, 2, [3]), {"more": 4}) == [
        ("first", 1),
        ("rest.0", 2),
        ("rest.1.0", 3),
        ("more", 4),
    ]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Scale.apply, ["x", "factor"]),
        (ScaleWithSetup.apply, ["x", "factor"]),
        (torch.mm, ["args.0", "args.1"]),
        (torch.compile(TwoInputs()), ["x", "mask"]),
        (functools.partial(lambda w, x, y: 0, 1), ["x", "y"]),
        (TwoInputs().forward, ["x", "mask"]),
        (torch.jit.script(nn.Bilinear(1, 1, 1)), ["input1", "input2"]),
    ],
    ids=["function", "function with setup_context", "builtin", "compiled", "partial", "method", "scripted"],
)
def test_every_kind_of_callable_names_its_inputs(model, names):
    assert [name for name, _ in input_names(model, (1, 2), {})] == names


# What a message says of inputs that the model refuses


class Reader(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x)


def test_the_tensors_that_were_given_are_listed():
    reader = Reader(nn.Linear(6, 4))
    given = given_inputs(reader, (torch.ones(3, 7),), {"mask": torch.ones(3, dtype=torch.bool)})
    assert given == "x=f32[3,7], mask=bool[3]"
    assert given_inputs(reader, ([torch.ones(()), torch.ones(2).to(torch.uint16)],), {}) == "x.0=f32[], x.1=uint16[2]"


def test_of_many_tensors_the_first_few_are_listed():
    given = given_inputs(lambda *xs: xs, [torch.ones(2)] * 6, {})
    assert given == "xs.0=f32[2], xs.1=f32[2], xs.2=f32[2], xs.3=f32[2] and 2 more"


def test_no_tensor_is_just_the_inputs():
    assert given_inputs(Reader(nn.Linear(6, 4)), (3,), {}) == "its inputs"


LAYERS = {
    "another width": (nn.Linear(6, 4), torch.ones(3, 7), "x=f32[8,6]"),
    "another dtype": (nn.Linear(6, 4), torch.ones(3, 6).double(), "x=f32[8,6]"),
    "no width at all": (nn.Linear(6, 4), torch.ones(()), "x=f32[8,6]"),
    "other channels": (nn.Conv2d(3, 4, 3), torch.ones(2, 1, 9, 9), "x=f32[4,3,32,32]"),
    "numbers for an embedding": (nn.Embedding(5, 4), torch.ones(3), "x=i64[8,16]@0..5"),
    "words that are not in it": (nn.Embedding(5, 4), torch.tensor([1, 5]), "x=i64[8,16]@0..5"),
    "features of a sequence": (nn.GRU(6, 4), torch.ones(3, 2, 7), "x=f32[16,8,6]"),
}


@pytest.mark.parametrize("what", LAYERS)
def test_an_input_that_the_first_layer_does_not_take_is_told_one_that_it_takes(what):
    layer, given, wanted = LAYERS[what]
    with pytest.raises((RuntimeError, IndexError)):
        layer(given)
    assert first_layer_remedy(Reader(layer), (given,), {}) == f" Layer 'layer' takes, for example, --input '{wanted}'."


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.Linear(6, 4), torch.ones(2, 3, 6)),
        (nn.Conv2d(3, 4, 3), torch.ones(3, 9, 9)),
        (nn.Embedding(5, 4), torch.tensor([0, 4], dtype=torch.int32)),
    ],
    ids=["more dimensions", "no batch", "short integers"],
)
def test_an_input_that_it_takes_is_no_misfit(layer, given):
    layer(given)
    assert first_layer_remedy(Reader(layer), (given,), {}) == ""


def test_a_layer_that_is_the_model_is_it():
    assert first_layer_remedy(nn.Linear(6, 4), (torch.ones(7),), {}) == (
        " It takes, for example, --input 'input=f32[8,6]'."
    )


def test_without_a_layer_nothing_is_proposed():
    assert first_layer_remedy(torch.relu, (torch.ones(7),), {}) == ""
    assert first_layer_remedy(nn.ReLU(), (torch.ones(7),), {}) == ""
