from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradctl.core.errors import TargetError
from gradctl.core.names import DTYPES
from gradctl.subject.inputs.specification import InputSpec, TensorSpec, draw, parse_input

EXAMPLE = "Write, for example, --input 'x=f32[8,784]'."


def drawn(text, seed=0):
    return draw(parse_input(text).value, torch.Generator().manual_seed(seed))


# Any spec, written and read again

INTEGERS = {"i8": (-(2**7), 2**7), "i16": (-(2**15), 2**15), "i32": (-(2**31), 2**31), "i64": (-(2**63), 2**63 - 1)}
INTEGERS["u8"] = (0, 2**8)
FLOATS = {"f16": 65504.0, "bf16": 3e38, "f32": 3e38, "f64": 1e308}
names = st.none() | st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def ordered(numbers):
    return st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1])


@st.composite
def tensor_specs(draw_one):
    dtype = draw_one(st.sampled_from(sorted(DTYPES)))
    shape = draw_one(shapes)
    most = FLOATS.get(dtype, 1e3)
    between = normal = None
    if dtype in INTEGERS:
        between = draw_one(st.none() | ordered(st.integers(*INTEGERS[dtype])))
    elif dtype in FLOATS and draw_one(st.booleans()):
        between = draw_one(st.none() | ordered(st.floats(-most, most)))
    elif dtype != "bool":
        normal = draw_one(st.none() | st.tuples(st.floats(-most, most), st.floats(0, most)))
    return TensorSpec(dtype, shape, between, normal)


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


@given(st.builds(InputSpec, names, tensor_specs() | literals))
def test_what_is_written_is_read_again(spec):
    assert parse_input(str(spec)) == spec


@given(tensor_specs(), st.integers(0, 2**32))
def test_what_is_drawn_has_the_dtype_the_shape_and_the_range(spec, seed):
    tensor = draw(spec, torch.Generator().manual_seed(seed))
    assert tensor.dtype is getattr(torch, DTYPES[spec.dtype])
    assert tuple(tensor.shape) == spec.shape
    if spec.between is not None:
        low, high = spec.between
        if spec.dtype in INTEGERS:
            assert all(low <= value < high for value in tensor.flatten().tolist())
        else:
            lowest, highest = torch.tensor([low, high], dtype=torch.float64).to(tensor.dtype)
            assert ((lowest <= tensor) & (tensor <= highest)).all()


@given(st.text(max_size=20))
def test_any_other_text_is_refused_by_code_or_is_a_literal(text):
    try:
        spec = parse_input(text)
    except TargetError as error:
        assert error.code == "GC104"
        assert error.message.startswith(f"--input {text!r}: ")
        assert error.message.endswith(EXAMPLE)
    else:
        assume(not isinstance(spec.value, TensorSpec))
        assert spec.value == eval(text.partition("=")[2] if spec.name else text.strip())


# Examples


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x=f32[8,784]", InputSpec("x", TensorSpec("f32", (8, 784)))),
        ("f32[8,784]", InputSpec(None, TensorSpec("f32", (8, 784)))),
        (" x = f32 [ 8 , 784 ] ", InputSpec("x", TensorSpec("f32", (8, 784)))),
        ("x=f32[]", InputSpec("x", TensorSpec("f32", ()))),
        ("ids=i64[8,16]@0..100", InputSpec("ids", TensorSpec("i64", (8, 16), (0, 100)))),
        ("x=f64[3]@-1.5..2e-3", InputSpec("x", TensorSpec("f64", (3,), (-1.5, 0.002)))),
        ("x=bf16[3] ~ N( 0 , 0.1 )", InputSpec("x", TensorSpec("bf16", (3,), None, (0.0, 0.1)))),
        ("flag=True", InputSpec("flag", True)),
        ("n=3", InputSpec("n", 3)),
        ("3", InputSpec(None, 3)),
        ("x=None", InputSpec("x", None)),
        ("mode='a=b'", InputSpec("mode", "a=b")),
        ("shape=[8,784]", InputSpec("shape", [8, 784])),
    ],
)
def test_a_spec_is_read(text, spec):
    assert parse_input(text) == spec


def test_without_a_range_floats_are_standard_normal():
    values = drawn("f32[10000]")
    assert abs(values.mean()) < 0.05  # five times 1/sqrt(10000)
    assert abs(values.std() - 1) < 0.05


def test_without_a_range_integers_go_from_0_to_9_and_bools_are_both():
    assert sorted(drawn("i64[1000]").unique().tolist()) == list(range(10))
    assert sorted(drawn("bool[100]").unique().tolist()) == [False, True]


def test_the_bound_of_integers_does_not_occur():
    assert sorted(drawn("u8[1000]@254..256").unique().tolist()) == [254, 255]


def test_a_normal_distribution_has_its_mean_and_deviation():
    values = drawn("f64[10000]~N(3,0.5)")
    assert abs(values.mean() - 3) < 0.025
    assert abs(values.std() - 0.5) < 0.025
    assert drawn("c64[10]~N(2,0)").tolist() == [2 + 0j] * 10


def test_a_uniform_range_is_filled():
    values = drawn("f32[10000]@-2..2")
    assert values.min() < -1.99
    assert values.max() > 1.99


def test_one_seed_draws_one_value():
    assert drawn("f32[4]", seed=1).equal(drawn("f32[4]", seed=1))
    assert not drawn("f32[4]", seed=1).equal(drawn("f32[4]", seed=2))


def test_half_precision_is_float32_rounded():
    assert drawn("f16[64]").equal(drawn("f32[64]").half())
    assert drawn("bf16[64]").equal(drawn("f32[64]").bfloat16())


def test_a_narrow_range_is_kept_to_the_last_bit():
    lowest, highest = torch.tensor([0.1, 0.1000001])
    values = drawn("f32[1000]@0.1..0.1000001")
    assert ((lowest <= values) & (values <= highest)).all()


def test_a_default_device_of_the_users_does_not_move_what_is_drawn():
    with torch.device("meta"):
        assert [drawn(f"{dtype}[2]").device.type for dtype in DTYPES] == ["cpu"] * len(DTYPES)


# Mistakes

DTYPE_NAMES = "there are f16, bf16, f32, f64, c64, c128, i8, i16, i32, i64, u8, bool"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x=float32[3]", f"'float32' is no dtype (did you mean 'f32'?); {DTYPE_NAMES}"),
        ("x=fp16[3]", f"'fp16' is no dtype (did you mean 'f16'?); {DTYPE_NAMES}"),
        ("x=i46[3]", f"'i46' is no dtype (did you mean 'i64'?); {DTYPE_NAMES}"),
        ("x=q[3]", f"'q' is no dtype; {DTYPE_NAMES}"),
        ("x=f32[8,a]", "[8,a] is no shape: sizes are whole numbers from 0, with commas between them"),
        ("x=f32[8,-1]", "[8,-1] is no shape: sizes are whole numbers from 0, with commas between them"),
        ("x=f32[8,]", "[8,] is no shape: sizes are whole numbers from 0, with commas between them"),
        ("x=f32[3]@1..0", "@1..0 is empty: 0 itself does not occur"),
        ("x=i64[3]@5..5", "@5..5 is empty: 5 itself does not occur"),
        ("x=i64[3]@0..2.5", "'2.5' is no whole number"),
        ("x=f32[3]@a..1", "'a' is no number"),
        ("x=f32[3]@0..inf", "'inf' is not finite"),
        ("x=i8[3]@0..1000", "@0..1000 does not fit i8, which goes from -128 to 127"),
        ("x=u8[3]@-1..3", "@-1..3 does not fit u8, which goes from 0 to 255"),
        ("x=f16[3]@0..1e9", "@0..1e9 does not fit f16, which goes from -65504 to 65504"),
        ("x=f32[3]@5", "'@5' after the shape is neither @low..high nor ~N(mean,std)"),
        ("x=f32[3]~N(1)", "'~N(1)' after the shape is neither @low..high nor ~N(mean,std)"),
        ("x=f32[3]4", "'4' after the shape is neither @low..high nor ~N(mean,std)"),
        ("x=f32[3]~N(0,-1)", "the standard deviation -1.0 is below 0"),
        ("x=f32[3]~N(a,1)", "'a' is no number"),
        ("x=i64[3]~N(0,1)", "an integer tensor takes @low..high and no '~N(0,1)'"),
        ("x=c64[3]@0..1", "a complex tensor takes ~N(mean,std) and no '@0..1'"),
        ("x=bool[3]@0..1", "a bool has no range, and '@0..1' was given"),
        (
            "x=true",
            "'true' is neither a tensor like f32[8,784] nor a Python literal like 3, True or 'mean' "
            "(did you mean True?)",
        ),
        ("x=f32(8)", "'f32(8)' is neither a tensor like f32[8,784] nor a Python literal like 3, True or 'mean'"),
        ("x=", "'' is neither a tensor like f32[8,784] nor a Python literal like 3, True or 'mean'"),
    ],
)
def test_a_mistake_is_named_with_an_example(text, why):
    with pytest.raises(TargetError) as caught:
        parse_input(text)
    assert str(caught.value) == f"GC104 --input {text!r}: {why}. {EXAMPLE}"
    assert caught.value.exit_code == 2


def test_ranges_of_floats_do_not_overflow_on_the_way():
    assert math.isfinite(drawn("f64[100]@-1.7e308..1.7e308").abs().max())
