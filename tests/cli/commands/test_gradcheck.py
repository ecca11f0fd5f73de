"""``gradctl gradcheck`` from end to end, as a process: what it says, on which stream, and its exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradctl.core.names import FORMATS
from tests.cli.command_line import gradctl

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "gradctl/report/schema.json").read_text())

NET = """
import os
import signal
import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dtype="float32"):
        super().__init__()
        self.fc1 = nn.Linear(6, 4, dtype=getattr(torch, dtype))
        self.fc2 = nn.Linear(4, 2, dtype=getattr(torch, dtype))

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


class Counts(nn.Module):
    def forward(self, n):
        return n + 1


class Raises(Net):
    def forward(self, x):
        raise ValueError("the width must be even.")


class Cut(Net):
    def forward(self, x):
        return super().forward(x).detach()


class Says(Net):
    def forward(self, x):
        return "a word"


class DividesByZero(Net):
    def forward(self, x):
        return super().forward(x) / 0 * 0


class Huge(Net):
    def forward(self, x):
        return super().forward(x) + torch.empty(2**46).sum()


class Exits(Net):
    def forward(self, x):
        sys.exit(0)


class Leaves(Net):
    def forward(self, x):
        os._exit(0)


class Waits(Net):
    def forward(self, x):
        print("ready", flush=True)
        signal.pause()


# A shell's background job ignores it, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Prints(Net):
    def forward(self, x):
        print("from python")
        os.write(1, b"from below\\n")
        os.system("echo from a child")
        return super().forward(x)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x**2 * gradient


def square_loss(outputs):
    return outputs.square().sum()

"""

BROKEN = """
def load():
    import a_package_that_is_not_there


load()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with what a user has: models, a package, weights that fit and some that do not."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "nets.py").write_text(NET)
    (folder / "net.py").write_text(NET)
    (folder / "broken.py").write_text(BROKEN)
    (folder / "line.py").write_text("from torch import nn\n\nmodel = nn.Linear(3, 2)\n")
    weights = {"fc1.weight": torch.ones(4, 6), "fc1.bias": torch.ones(4), "fc2.weight": torch.ones(2, 4)}
    save_file({**weights, "fc2.bias": torch.zeros(2)}, folder / "fit.safetensors")
    save_file({**weights, "fc2.b": torch.zeros(2)}, folder / "misnamed.safetensors")
    torch.save(nn.Linear(6, 4), folder / "pickled.pt")
    return folder


X = ("--input", "x=f32[3,6]")

BAD_INPUT = {
    "a size without an axis": (
        ["net.py:Net", *X, "--sizes", "batch=1,2; width=6"],
        2,
        "GC128 --sizes: no axis has the name 'width'. Name the axis, for example --sizes 'batch=1,2; width@x:1=6', or "
        "let the function of inputs beside the target take width=.",
    ),
    "a missing file": (
        ["nett.py", *X],
        2,
        "GC101 there is no file 'nett.py' (did you mean 'net.py'?). Paths start at '{folder}'.",
    ),
    "no such name": (["net.py:Nett", *X], 2, "GC102 net.py has no 'Nett' (did you mean 'Net'?)."),
    "a wrong specification": (
        ["net.py:Net", "--input", "x=f23[3,6]"],
        2,
        "GC104 --input 'x=f23[3,6]': 'f23' is no dtype (did you mean 'f32'?); there are f16, bf16, f32, f64, c64, "
        "c128, i8, i16, i32, i64, u8, bool. Write, for example, --input 'x=f32[8,784]'.",
    ),
    "no differentiable output": (
        ["net.py:Cut", *X],
        5,
        "GC110 no output of net.py:Cut has a gradient: each is an integer, a constant, or detached from every "
        "leaf (detach, no_grad). There is nothing to check.",
    ),
    "no differentiable leaf": (
        ["net.py:Counts", "--input", "n=i64[3]"],
        5,
        "GC110 net.py:Counts has no differentiable leaf: no trainable parameter and no float input. Give it a float "
        "input, or unfreeze a parameter.",
    ),
    "an output that is no tensor": (
        ["net.py:Says", *X],
        2,
        "GC114 net.py:Says returns 'str' without a tensor in it; return a tensor, or a tuple, dict or dataclass of "
        "tensors.",
    ),
    "a name that no tensor has": (
        ["net.py:Net", *X, "--tensor", "fc1.weight"],
        2,
        "GC115 no tensor matches --tensor 'fc1.weight' (did you mean 'param:fc1.weight'?); there are 5: "
        "param:fc1.weight, param:fc1.bias, param:fc2.weight, param:fc2.bias …",
    ),
    "weights that do not match": (
        ["net.py:Net", *X, "--weights", "misnamed.safetensors"],
        2,
        "GC121 misnamed.safetensors: 2 of 5 names do not fit the model: missing fc2.bias; unknown fc2.b (did you mean "
        "'fc2.bias'?). Rename them in the file, or load it in your factory.",
    ),
    "a pickled checkpoint": (
        ["net.py:Net", *X, "--weights", "pickled.pt"],
        2,
        "GC901 pickled.pt holds pickled code (torch.nn.modules.linear.Linear), which runs when loaded. Save a state "
        "dict: torch.save(model.state_dict(), 'pickled.pt').",
    ),
    "a report that cannot be written": (
        ["net.py:Net", *X, "--report", "json=no/such/report.json"],
        2,
        "GC131 'no/such/report.json' cannot be written: there is no folder 'no/such'. Create it, or use another path.",
    ),
    "a model that ends the process": (
        ["net.py:Leaves", *X],
        4,
        "GC801 the program that is checked ended the process: os._exit(0) at {folder}/net.py:{leaves}. Raise an "
        "exception there instead.",
    ),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_a_code_and_one_sentence(what, folder):
    arguments, exit_code, sentence = BAD_INPUT[what]
    line = 1 + NET.splitlines().index("        os._exit(0)")
    sentence = sentence.replace("{folder}", str(folder)).replace("{leaves}", str(line))
    finished = gradctl("gradcheck", *arguments, cwd=folder)
    assert (finished.returncode, finished.stdout, finished.stderr) == (exit_code, "", f"{sentence}\n")


RAISING = {
    "an import error": (
        ["broken.py"],
        "GC103 broken.py cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'. "
        "Install it beside gradctl, or start where python finds 'a_package_that_is_not_there'.",
        ["broken.py", "broken.py"],
    ),
    "a wrong shape": (
        ["net.py:Net", "--input", "x=f32[3,7]"],
        "GC111 net.py:Net raises on x=f32[3,7]: RuntimeError: mat1 and mat2 shapes cannot be multiplied (3x7 and 6x4). "
        "Layer 'fc1' takes, for example, --input 'x=f32[8,6]'.",
        ["net.py"],
    ),
    "a model that raises": (
        ["net.py:Raises", *X],
        "GC111 net.py:Raises raises on x=f32[3,6]: ValueError: the width must be even.",
        ["net.py"],
    ),
    "a model that calls sys.exit": (
        ["net.py:Exits", *X],
        "GC111 net.py:Exits raises on x=f32[3,6]: SystemExit: 0.",
        ["net.py"],
    ),
}


@pytest.mark.parametrize("what", RAISING)
def test_of_the_users_exception_the_users_frames_are_shown(what, folder):
    arguments, sentence, files = RAISING[what]
    finished = gradctl("gradcheck", *arguments, cwd=folder)
    first, *details = finished.stderr.splitlines()
    assert (finished.returncode, finished.stdout, first) == (2, "", sentence)
    assert re.findall(r'File "(.*)", line', "\n".join(details)) == [str(folder / file) for file in files]


def test_without_inputs_the_line_to_type_is_proposed_and_works(folder):
    finished = gradctl("gradcheck", "line.py", cwd=folder)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "GC107 line.py has no inputs. Define example_inputs() next to it, or adapt this to your data: "
        "gradctl gradcheck line.py --input 'input=f32[8,3]'.\n"
    )
    (line,) = re.findall(r"gradctl (gradcheck .*)\.$", finished.stderr)
    typed = gradctl(*shlex.split(line), cwd=folder)
    assert (typed.returncode, typed.stderr) == (0, "")
    assert typed.stdout == "PASS: 3 gradients match finite differences\n"


def test_out_of_memory_is_no_verdict(folder):
    finished = gradctl("gradcheck", "net.py:Huge", *X, cwd=folder)
    assert (finished.returncode, finished.stdout) == (4, "")
    assert re.fullmatch(
        r"GC803 out of memory: .*you tried to allocate 281474976710656 bytes\..* Use a smaller batch \(it runs the "
        r"same code\), or free memory and run again\.\n",
        finished.stderr,
    )


def test_an_output_that_is_nan_fails_and_is_named_before_the_gradients_it_spoils(folder):
    finished = gradctl("gradcheck", "net.py:DividesByZero", *X, cwd=folder)
    assert (finished.returncode, finished.stderr) == (1, "")
    first, *_, last = finished.stdout.splitlines()
    assert first == "error GC407 output is NaN or infinite in 6 of 6 elements; its gradient means"
    assert "  this makes 5 of 5 gradients wrong:\n" in finished.stdout
    assert finished.stdout.count("GC407 ") == 1
    assert last == "FAIL: 5 of 5 gradients are wrong (gradctl explain GC407)"


def test_ctrl_c_is_130_and_a_word(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "gradctl", "gradcheck", "net.py:Waits", *X],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.strip()) == (130, "", "interrupted")


def test_a_closed_pipe_keeps_the_exit_code_of_the_verdict():
    read_end, write_end = os.pipe()
    os.close(read_end)
    finished = subprocess.run(
        [sys.executable, "-m", "gradctl", "gradcheck", "sample_models/wrong_backward.py"],
        cwd=ROOT,
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert (finished.returncode, finished.stderr) == (1, b"")


def without_seconds(text):
    return re.sub(r'"seconds": [0-9.e+-]+', '"seconds": 0', text)


def report_of(finished):
    """Return the JSON report on standard output, after holding it against the schema that is shipped."""
    report = json.loads(finished.stdout)
    jsonschema.validate(report, SCHEMA)
    return report


def test_the_right_model_passes_with_its_bound_and_the_same_bytes_twice():
    line = ["sample_models/mlp.py", "--seed", "3", "--format", "json"]
    once, twice = (gradctl("gradcheck", *line, cwd=ROOT, fresh=True) for _ in range(2))
    assert (once.returncode, once.stderr) == (0, "")
    assert without_seconds(once.stdout) == without_seconds(twice.stdout)
    report = report_of(once)
    (unit,) = report["units"]
    assert (report["verdict"], report["seed"], len(unit["tensors"])) == ("pass", 3, 7)
    assert 0 < unit["oracle"]["missed_with_probability"] < 1e-6


@pytest.fixture(scope="module")
def wrong_backward(tmp_path_factory):
    """Return the process that judged the wrong backward, and its reports in the other formats by name."""
    files = {name: tmp_path_factory.mktemp("reports") / name for name in FORMATS if name != "json"}
    reports = [word for name, path in files.items() for word in ("--report", f"{name}={path}")]
    finished = gradctl("gradcheck", "sample_models/wrong_backward.py", "--format", "json", *reports, cwd=ROOT)
    return finished, {name: path.read_text() for name, path in files.items()}


def test_the_wrong_backward_is_named_with_the_parameter_it_spoils(wrong_backward):
    finished, texts = wrong_backward
    assert (finished.returncode, finished.stderr) == (1, "")
    first, *_, last = texts["console"].splitlines()
    # A mean over a batch of 8 is an eighth of the sum.
    assert first == "error GC408 LeakyReLU.backward is not the derivative in 'slope': off by 8.75e-01"
    assert "  at sample_models/wrong_backward.py:21, act, LeakyReLU\n" in texts["console"]
    assert "  this makes 1 of 6 gradients wrong:\n" in texts["console"]
    assert "\n  param:act.slope  float32[16]  WRONG          8.75e-01" in texts["console"]
    assert last == "FAIL: 1 of 6 gradients is wrong (gradctl explain GC408)"
    assert max(map(len, texts["console"].splitlines())) <= 80


def test_a_failing_report_is_valid_by_the_shipped_schema(wrong_backward):
    report = report_of(wrong_backward[0])
    assert report["summary"] == {"pass": 0, "fail": 1, "inconclusive": 0, "skipped": 0}
    by_code = {each["code"]: each for each in report["units"][0]["findings"]}
    assert (by_code["GC401"]["tensor"], by_code["GC401"]["cause"]) == ("param:act.slope", "GC408")
    place = by_code["GC408"]["location"]
    assert (place["file"], place["line"], place["op"]) == ("sample_models/wrong_backward.py", 21, "LeakyReLU")


def test_the_other_formats_name_the_same(wrong_backward):
    texts = wrong_backward[1]
    assert "| `param:act.slope` | `float32[16]` | WRONG |" in texts["markdown"]
    assert texts["github"].startswith("::error file=sample_models/wrong_backward.py,line=21")
    assert all(json.loads(line) for line in texts["jsonl"].splitlines())
    failure = ET.fromstring(texts["junit"]).find(".//testcase/failure")
    assert (failure.get("type"), "param:act.slope" in failure.text) == ("GC408", True)


def test_a_straight_through_function_passes_with_exactly_the_line_that_is_printed():
    target = "sample_models/straight_through.py"
    finished = gradctl("gradcheck", target, cwd=ROOT)
    assert finished.returncode == 1
    (line,) = re.findall(r"if this is intentional, add (.*)$", finished.stdout, re.MULTILINE)
    assert line == "--allow GC408:RoundStraightThrough"
    allowed = gradctl("gradcheck", target, *shlex.split(line), cwd=ROOT)
    assert (allowed.returncode, allowed.stderr) == (0, "")
    first, *_, last = allowed.stdout.splitlines()
    assert first.startswith("allowed GC408 RoundStraightThrough.backward is not the derivative in 'x'")
    assert last == "PASS: 5 gradients match finite differences, 1 finding allowed"


def test_straight_through_by_detach_passes_with_a_note_that_can_be_made_to_fail():
    target = "sample_models/straight_through_detach.py"
    finished = gradctl("gradcheck", target, cwd=ROOT)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("note GC404 gradient flow stops here")
    assert f"({target}:21)\nPASS: 5 gradients match" in finished.stdout
    strict = gradctl("gradcheck", target, "--fail-on", "note", cwd=ROOT)
    assert (strict.returncode, strict.stdout.splitlines()[-1]) == (1, "FAIL: 1 finding (gradctl explain GC404)")


def test_an_allow_that_accepts_nothing_is_noted_and_counts_as_a_note(folder):
    finished = gradctl("gradcheck", "net.py:Net", *X, "--allow", "GC408:Gone", "--fail-on", "note", cwd=folder)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert finished.stdout == (
        "note GC150 --allow GC408:Gone accepted nothing in this run.\nFAIL: 1 finding (gradctl explain GC150)\n"
    )


def test_what_a_float16_model_prints_is_not_the_report(folder):
    line = ["net.py:Prints", "--arg", "dtype=float16", "--input", "x=f16[3,6]", "--format", "json"]
    finished = gradctl("gradcheck", *line, cwd=folder)
    assert finished.returncode == 0
    (unit,) = report_of(finished)["units"]
    assert {tensor["dtype"] for tensor in unit["tensors"]} == {"float16"}
    assert {"from python", "from below", "from a child"} == set(finished.stderr.splitlines())


def test_the_tensors_of_a_bfloat16_model_are_chosen_and_probed_one_by_one(folder):
    line = ["net.py:Net", "--arg", "dtype=bfloat16", "--input", "x=bf16[3,6]", "--format", "json"]
    chosen = gradctl("gradcheck", *line, "--tensor", "param:fc1.*", "--probes", "3", "--thorough", cwd=folder)
    (unit,) = report_of(chosen)["units"]
    judged = [(tensor["tensor"], tensor["dtype"], tensor["verdict"]) for tensor in unit["tensors"]]
    assert judged == [("param:fc1.weight", "bfloat16", "same"), ("param:fc1.bias", "bfloat16", "same")]
    assert unit["oracle"]["probes"] == 3
    joint = gradctl("gradcheck", *line, "--tensor", "param:fc1.*", "--probes", "3", cwd=folder)
    assert unit["oracle"]["forwards"] > report_of(joint)["units"][0]["oracle"]["forwards"]


def test_a_module_of_a_package_with_weights_and_a_loss(folder):
    line = ["package.nets:Net", *X, "--weights", "fit.safetensors", "--loss", "square_loss", "--format", "json"]
    finished = gradctl("gradcheck", *line, "--allow", "GC404", cwd=folder)
    assert (finished.returncode, finished.stderr) == (0, "")
    (unit,) = report_of(finished)["units"]
    assert (unit["target"], unit["verdict"], len(unit["tensors"])) == ("package.nets:Net", "pass", 5)
    assert [(finding["code"], finding["severity"]) for finding in unit["findings"]] == [("GC150", "note")]


def test_a_function_by_its_class_fails_and_passes_within_a_wide_tolerance_without_a_bound(folder):
    line = ["net.py:Cube", "--input", "f32[7]"]
    finished = gradctl("gradcheck", *line, "--rtol", "0.01", cwd=folder)
    assert (finished.returncode, finished.stderr) == (1, "")
    # 2 x² where 3 x² is the derivative: a third is missing.
    assert finished.stdout.startswith("error GC408 Cube.backward is not the derivative in 'x': off by 3.33e-01\n")
    assert finished.stdout.endswith("FAIL: 1 of 1 gradient is wrong (gradctl explain GC408)\n")
    tolerated = gradctl("gradcheck", *line, "--rtol", "2", cwd=folder)
    assert (tolerated.returncode, tolerated.stdout) == (0, "PASS: 1 gradient matches finite differences\n")


def test_a_model_that_raises_in_a_later_call_is_not_gradctl_s_mistake(tmp_path):
    (tmp_path / "net.py").write_text(
        "calls = iter(range(9))\n\n\ndef net(x):\n    if next(calls):\n        raise OSError('no more')\n"
        "    return x * x\n"
    )
    finished = gradctl("gradcheck", "net.py:net", "--input", "f32[3]", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    said = f"GC111 the model raises in a call after the first: OSError: no more ({tmp_path / 'net.py'}:6).\n"
    assert finished.stderr.startswith(said)
    assert "internal error of gradctl" not in finished.stderr


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1"])
def test_a_tolerance_is_a_number_that_can_be_exceeded(tolerance):
    finished = gradctl("gradcheck", "net.py", "--rtol", tolerance)
    assert (finished.returncode, finished.stdout) == (2, "")
    said = f"Error: Invalid value for '--rtol': {float(tolerance)!r} is not a finite number of at least 0.\n"
    assert finished.stderr.endswith(said)


def test_sizes_are_checked_and_counted(folder):
    finished = gradctl("gradcheck", "net.py:Net", *X, "--sizes", "batch=1,2,9; x:1=6", cwd=folder)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "PASS: 5 gradients match finite differences at 7 sizes and layouts\n"


def test_a_size_that_is_refused_is_printed_with_the_reason_of_the_model(folder):
    finished = gradctl("gradcheck", "net.py:Net", *X, "--sizes", "x:1=6,7", cwd=folder)
    assert finished.returncode == 0
    assert finished.stdout.startswith("not tried: x:1=7; x:1=7, ")
    assert "RuntimeError: mat1 and mat2" in finished.stdout
    assert finished.stdout.endswith("PASS: 5 gradients match finite differences at 3 sizes and layouts\n")


def test_no_program_is_written_for_other_sizes(folder):
    finished = gradctl("gradcheck", "net.py:Net", *X, "--sizes", "batch=1", "--repro", "programs", cwd=folder)
    assert finished.returncode == 2
    assert "--repro writes programs for the sizes of the example. Omit --sizes, and pass --input." in finished.stderr


def test_a_limit_of_one_size_is_a_usage_error(folder):
    finished = gradctl("gradcheck", "net.py:Net", *X, "--sizes", "batch=1,2", "--max-sizes", "1", cwd=folder)
    assert finished.returncode == 2
    assert "1 is not in the range x>=2" in finished.stderr
