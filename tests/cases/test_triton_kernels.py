"""Triton kernels on the CPU, by Triton's interpreter: right and wrong ones, in each dtype, and what is refused.

The interpreter is switched on before triton is imported, so that each check is a process of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from tests.cli import command_line

ROOT = Path(__file__).parents[2]
SAMPLE = "sample_models/triton_kernel.py"
pytestmark = [
    pytest.mark.slow,  # a process each, which starts in seconds
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs pip install 'gradctl[triton]'"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here"),
]


def gradctl(*arguments, **options):
    # A fork has triton already, which Dynamo imports.
    return command_line.gradctl(*arguments, fresh=True, **options)


# y = 2 x by a kernel that computes in another dtype than its tensors have.
DOUBLE = """
    import torch, triton, triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, LENGTH: tl.constexpr):
        at = tl.arange(0, LENGTH)
        x = tl.load(x_ptr + at){conversion}
        tl.store(y_ptr + at, {computed})

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.empty_like(x)
            kernel[(1,)](x, y, LENGTH=x.numel())
            return y

        @staticmethod
        def backward(ctx, gradient):
            return {factor} * gradient
"""


def gradcheck_double(folder, dtype, *, conversion="", computed="x + x", factor=2.0, **environment):
    text = DOUBLE.format(conversion=conversion and f".to({conversion})", computed=computed, factor=factor)
    (folder / "double.py").write_text(dedent(text))
    return gradctl("gradcheck", "double.py:Double", "--input", f"x={dtype}[16]", cwd=folder, **environment)


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16"])
def test_the_sample_is_right_in_each_dtype_that_the_interpreter_has(dtype):
    inputs = ("--input", f"x={dtype}[6,20]", "--input", f"weight={dtype}[20]")
    finished = gradctl("gradcheck", f"{SAMPLE}:fused", *inputs, cwd=ROOT)
    assert (finished.returncode, finished.stdout) == (0, "PASS: 2 gradients match finite differences\n"), (
        finished.stderr
    )


def test_the_wrong_twin_is_named_by_gradcheck():
    finished = gradctl("gradcheck", f"{SAMPLE}:fused_wrong", cwd=ROOT)
    assert finished.returncode == 1
    assert "GC408 RMSNorm.backward is not the derivative in 'x'" in finished.stdout
    assert finished.stdout.endswith("FAIL: 1 of 2 gradients is wrong (gradctl explain GC408)\n")


@pytest.mark.parametrize(("candidate", "code"), [("fused", 0), ("fused_wrong", 1)])
def test_the_sample_compared_with_plain_pytorch(candidate, code):
    finished = gradctl("compare", f"{SAMPLE}:reference", f"{SAMPLE}:{candidate}", cwd=ROOT)
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert ("input:x" in finished.stdout) == bool(code) and "input:weight" not in finished.stdout


@pytest.mark.parametrize("conversion", ["", "tl.float32", "tl.float16"])
def test_a_kernel_that_converts_is_compared_in_float64(tmp_path, conversion):
    right = gradcheck_double(tmp_path, "f32", conversion=conversion)
    assert (right.returncode, right.stdout) == (0, "PASS: 1 gradient matches finite differences\n"), right.stderr
    wrong = gradcheck_double(tmp_path, "f32", conversion=conversion, factor=2.002)
    assert wrong.returncode == 1
    assert "GC408 Double.backward is not the derivative in 'x': off by 1.00e-03" in wrong.stdout


def test_a_sum_of_products_that_accumulates_in_float32_is_compared_in_float64(tmp_path):
    square = "tl.reshape(x, 4, 4).to(tl.float16)"
    computed = f"tl.reshape(tl.dot({square}, {square}, tl.zeros((4, 4), tl.float32)), 16)"
    finished = gradcheck_double(tmp_path, "f32", computed=computed)  # a square: its gradient is not 2
    assert finished.returncode == 1 and "tolerance" in finished.stdout
    tolerance = float(finished.stdout.partition("WRONG")[2].split()[1])
    assert tolerance < 1e-6  # in float16 finite differences resolve 1e-2


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (
            "bf16",
            {},
            "kernel 'kernel' takes a bfloat16 tensor: Triton's interpreter computes wrong numbers in bfloat16",
        ),
        ("f32", {"conversion": "tl.bfloat16"}, "a Triton kernel converts to bfloat16: Triton's interpreter computes"),
        ("f16", {"computed": "tl.exp(x)"}, "Triton's interpreter does not compute this in 16 bit: ValueError"),
        ("f32", {"TRITON_INTERPRET": "0"}, "a Triton kernel found no GPU, and TRITON_INTERPRET=1 was not set when"),
    ],
)
def test_what_the_interpreter_cannot_do_is_inconclusive(tmp_path, dtype, options, said):
    finished = gradcheck_double(tmp_path, dtype, **options)
    assert (finished.returncode, finished.stdout) == (4, "")
    assert finished.stderr.startswith(f"GC127 {said}")
    assert len(finished.stderr.strip().splitlines()) == 1


def test_a_mistake_in_a_kernel_is_the_models_own(tmp_path):
    finished = gradcheck_double(tmp_path, "f32", computed="x + nothing")
    assert finished.returncode == 2
    assert "GC111 double.py:Double raises on x=f32[16]: InterpreterError: NameError" in finished.stderr


def test_a_unit_of_check_that_cannot_be_judged_is_inconclusive(tmp_path):
    (tmp_path / "gradctl.toml").write_text('[[targets]]\ntarget = "double.py:Double"\ninput = ["x=bf16[16]"]\n')
    gradcheck_double(tmp_path, "f32")
    finished = gradctl("check", "--form", "eager", cwd=tmp_path)
    assert finished.returncode == 4, finished.stdout + finished.stderr
    assert "GC127 kernel 'kernel' takes a bfloat16 tensor" in " ".join(finished.stdout.split())


@pytest.mark.parametrize(("computed", "code"), [("(x * 0.7).to(tl.float16)", 0), ("(x * 0.71).to(tl.float16)", 1)])
def test_a_candidate_that_rounds_to_16_bit_inside_is_compared_in_float64(tmp_path, computed, code):
    text = dedent(DOUBLE.format(conversion=".to(tl.float16)", computed=computed, factor=0.7))
    text += "\ndef reference(x):\n    return 0.7 * x\n\ndef fused(x):\n    return Double.apply(x.contiguous())\n"
    (tmp_path / "scaled.py").write_text(text)
    arguments = ("compare", "scaled.py:reference", "scaled.py:fused", "--input", "x=f16[16]")
    finished = gradctl(*arguments, cwd=tmp_path)
    assert finished.returncode == code, finished.stdout + finished.stderr
