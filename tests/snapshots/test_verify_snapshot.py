"""What ``verify`` sees, and what it does not call a change."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.snapshots import snapshot_file
from gradctl.snapshots.take_snapshot import take_snapshot
from gradctl.snapshots.verify_snapshot import options_of, verify_snapshot
from gradctl.subject.loading.load import load_subject, make_subject
from tests.snapshots.models import Net, X, changed, errors, scaled, take, verify

# Of these the gradient is not zero by cancellation.
JUDGED = ("inner.weight", "norm.weight", "norm.bias", "outer.weight", "outer.bias")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshots") / "net.snapshot"
    take(path)
    return path


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("factor", [1.0001, -1.0])
def test_one_scaled_gradient_is_found_and_no_other(net, name, factor):
    unit = verify(net, scaled(name, factor))
    assert errors(unit) == [("GC311", f"param:{name}")]
    assert unit.verdict == "fail"
    assert [each.tensor for each in unit.tensors if each.verdict == "differs"] == [f"param:{name}"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_model_itself_is_silent(net, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        unit = verify(net)
    finally:
        torch.set_num_threads(before)
    assert (unit.verdict, errors(unit)) == ("pass", [])
    # The bias before a normalisation has a gradient of rounding alone.
    apart = [each.tensor for each in unit.tensors if each.verdict == "too-small"]
    assert apart == ["param:inner.bias"]


def test_a_gradient_that_is_no_longer_zero_by_cancellation_differs(net):
    model = Net()
    model.inner.bias.register_hook(lambda gradient: gradient + 0.01)
    assert errors(verify(net, model)) == [("GC311", "param:inner.bias")]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda out: {**out, "y": out["y"] + 1e-4 * out["y"].detach()}, [("GC310", "output.y")]),
        (lambda out: {**out, "best": out["best"].flip(0)}, [("GC310", "output.best")]),
        (lambda out: {**out, "best": out["best"].int()}, [("GC310", "output.best")]),
        (lambda out: {**out, "more": out["y"].detach()}, [("GC313", "output.more")]),
        (lambda out: {"y": out["y"]}, [("GC313", "output.best")]),
        (lambda out: {**out, "y": torch.where(out["y"].detach() == out["y"].max(), torch.nan, out["y"])}, None),
    ],
)
def test_a_changed_output_is_found(net, function, found):
    seen = errors(verify(net, changed(function)))
    if found is None:  # NaN in one element of the output stops one gradient
        assert ("GC310", "output.y") in seen
    else:
        assert seen == found


def test_an_output_that_requires_no_gradient_any_more_is_found(net):
    unit = verify(net, changed(lambda out: {**out, "y": out["y"].detach()}))
    assert [each.message for each in unit.findings if each.tensor == "output.y"] == [
        "output.y requires a gradient in the snapshot, and not now."
    ]
    missing = {each.tensor for each in unit.findings if each.code == "GC313"}
    assert missing == {"input:x", "param:inner.bias", *(f"param:{name}" for name in JUDGED)}


def test_a_changed_buffer_is_found(net):
    model = Net()
    model.norm.momentum = 0.10001
    assert {code for code, _ in errors(verify(net, model))} == {"GC312"}


def test_other_values_of_the_model_are_a_note_and_those_of_the_snapshot_are_used(net):
    unit = verify(net, Net(seed=1), X + 1)
    (note,) = unit.findings
    assert (unit.verdict, note.code) == ("pass", "GC315")
    assert note.message == (
        "5 of 10 parameters, buffers and inputs of Net are others than in the snapshot (param:inner.weight, "
        "param:inner.bias, param:outer.weight and 2 more), although all random generators yield the same numbers from "
        "the seed; the run uses those of the snapshot."
    )


class Held(nn.Module):
    """Tied parameters, an expanded buffer, a tensor in a list, one in a closure, and a complex one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5))
        self.tied = self.weight
        self.register_buffer("shift", torch.randn(1).expand(5))
        self.scales = [torch.randn(5)]
        self.phase = torch.randn(5, dtype=torch.complex64)
        closed = torch.randn(5)
        self.function = lambda x: x * closed

    def forward(self, x):
        return (self.function(x) * self.weight * self.scales[0] + self.shift + self.tied) * self.phase


def test_every_tensor_that_the_model_holds_is_stored_and_used(tmp_path):
    path = tmp_path / "held.snapshot"
    taken = take(path, Held())
    assert {each.name.partition(":")[0] for each in taken.content.values} == {"param", "buffer", "held", "input"}
    assert len(taken.content.values) == 6
    model = Held(seed=1)
    before = [tensor.clone() for tensor in (model.weight, model.shift, *model.scales, model.phase)]
    unit = verify(path, model, X + 1)
    assert (unit.verdict, errors(unit)) == ("pass", [])
    assert all(map(torch.equal, before, (model.weight, model.shift, *model.scales, model.phase)))  # the user's own


class Noisy(nn.Module):
    def __init__(self, more=0):
        super().__init__()
        self.weight, self.more = nn.Parameter(torch.ones(5)), more

    def forward(self, x):
        torch.rand(self.more)
        return nn.functional.dropout(x * self.weight)


def test_random_numbers_are_the_same_and_others_are_said_first(tmp_path):
    path = tmp_path / "noisy.snapshot"
    assert take(path, Noisy()).content.header.draws[0] == X.numel()
    assert verify(path, Noisy()).verdict == "pass"
    unit = verify(path, Noisy(more=2))
    assert (unit.verdict, errors(unit)) == ("inconclusive", [("GC316", None)])
    assert unit.findings[0].message.startswith("the model draws 32 numbers instead of 30 from torch's generator")


def test_all_tensors_are_compared_exactly_if_they_are_stored(tmp_path):
    path = tmp_path / "full.snapshot"
    take(path, full=True)
    unit = verify(path, scaled("outer.weight"))
    (row,) = (each for each in unit.tensors if each.verdict == "differs")
    assert row.error == pytest.approx(1e-4, rel=1e-6)
    assert len(row.worst) == 5
    for each in row.worst:
        assert each.candidate == pytest.approx(each.reference * 1.0001, rel=1e-12)
    assert verify(path).verdict == "pass"


def test_elements_are_not_exchanged_unseen(net):
    model = Net()
    model.outer.weight.register_hook(lambda gradient: gradient.flatten().roll(1).view_as(gradient))
    assert errors(verify(net, model)) == [("GC311", "param:outer.weight")]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
def test_another_dtype_has_its_own_tolerance(net, dtype):
    unit = verify(net, dtype=dtype)
    assert (unit.verdict, errors(unit)) == ("pass", [])
    assert f"dtype the model's own -> {dtype}" in unit.findings[-1].message
    assert errors(verify(net, scaled("outer.weight", 1.5), dtype=dtype)) == [("GC311", "param:outer.weight")]


def test_a_device_that_is_not_there_is_said(net):
    with pytest.raises(TargetError, match="GC106 'gpu' is no device"):
        verify(net, device="gpu")


class NativeOnly(nn.Linear):
    def forward(self, x):
        assert x.dtype == torch.float32, "a kernel for float32"
        return super().forward(x)


def test_a_model_without_a_float64_run_is_compared_natively(tmp_path):
    path = tmp_path / "native.snapshot"
    taken = take(path, NativeOnly(5, 2))
    assert taken.content.header.float64_error == "AssertionError: a kernel for float32"
    assert verify(path, NativeOnly(5, 2)).verdict == "pass"
    assert verify(path, NativeOnly(5, 2), dtype="f32").verdict == "pass"
    model = NativeOnly(5, 2)
    model.weight.register_hook(lambda gradient: gradient * 1.0001)
    assert errors(verify(path, model)) == [("GC311", "param:weight")]


class Plain(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_a_model_that_no_longer_runs_in_float64_is_inconclusive(tmp_path):
    path = tmp_path / "linear.snapshot"
    take(path, Plain(5, 2))
    unit = verify(path, NativeOnly(5, 2))
    assert (unit.verdict, errors(unit)) == ("inconclusive", [])
    assert unit.reason == (
        "the model does not run in float64, as it did when the snapshot was taken: AssertionError: a kernel for float32"
    )


class InPlace(Plain):
    def forward(self, x):
        return super().forward(x.mul_(1.0))


def test_a_model_that_changes_its_inputs_now_is_compared_all_the_same(tmp_path):
    path = tmp_path / "linear.snapshot"
    take(path, Plain(5, 2))
    assert verify(path, InPlace(5, 2)).verdict == "pass"


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("net.py", "a/net.py"),
        ("../b/net.py:make", "b/net.py:make"),
        ("my.python/net.py:ops::relu", "a/my.python/net.py:ops::relu"),
        ("package.module:Net", "package.module:Net"),
        ("hf:llama", "hf:llama"),
    ],
)
def test_the_file_of_the_target_is_relative_to_the_snapshot(net, tmp_path, monkeypatch, target, found):
    header = snapshot_file.read(net).header
    header = msgspec.structs.replace(header, options=snapshot_file.LoadOptions(target=target))
    monkeypatch.chdir(tmp_path)
    assert options_of(header, tmp_path / "a" / "net.snapshot").target == found


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (nn.Linear(5, 4), X, "missing: param:inner.weight, param:inner.bias, param:norm.weight and "),
        (Net(), X[:2], "of another type: input:x (float32[2, 5], not float32[6, 5])"),
        (Net().double(), X.double(), "of another type: param:inner.weight (float64[7, 5], not float32[7, 5])"),
    ],
)
def test_the_snapshot_of_another_model_is_refused(net, model, inputs, said):
    with pytest.raises(TargetError) as raised:
        verify(net, model, inputs)
    assert (raised.value.code, raised.value.exit_code) == ("GC134", 2)
    assert said in raised.value.message


def test_a_snapshot_of_a_model_in_python_names_no_target(net):
    header = snapshot_file.read(net).header
    with pytest.raises(TargetError, match=r"GC134 .*net.snapshot is of a model that was given in Python \(Net\)"):
        options_of(header, net)
    assert options_of(header, net, "net.py").target == "net.py"


def test_without_values_the_same_are_needed(tmp_path):
    path = tmp_path / "digests.snapshot"
    take(path, values=False)
    assert [each.name for each in tmp_path.iterdir()] == ["digests.snapshot"]
    assert verify(path).verdict == "pass"
    assert errors(verify(path, scaled("outer.weight"))) == [("GC311", "param:outer.weight")]
    with pytest.raises(TargetError) as raised:
        verify(path, Net(), X + 1)
    assert (raised.value.code, raised.value.exit_code) == ("GC135", 2)
    assert "holds no values of input:x, and those of Net are others, although all random generators" in str(
        raised.value
    )


def test_the_reason_of_other_values_names_generator_and_conditions(tmp_path, monkeypatch):
    path = tmp_path / "digests.snapshot"
    taken = take(path, values=False)
    header = taken.content.header
    monkeypatch.setattr("gradctl.snapshots.verify_snapshot.generators", lambda seed: {**header.generators, "randn": ""})
    monkeypatch.setattr(
        "gradctl.snapshots.verify_snapshot.environment",
        lambda: {**header.environment, "CPU capability": "NONE", "threads": 9},
    )
    with pytest.raises(
        TargetError, match=r"are others, because generators yield other numbers from the seed: randn \(CPU cap"
    ):
        verify(path, Net(), X + 1)


def test_the_loss_and_its_seed_are_part_of_the_model(tmp_path):
    path = tmp_path / "loss.snapshot"
    subject = make_subject(Net(), X, loss=lambda out: out["y"].square().mean())
    taken = take_snapshot(subject, path)
    assert [each.name for each in taken.content.tensors if each.quantity == "output"] == ["output"]
    with pytest.raises(TargetError, match="GC113 the loss returns a tensor of shape"):
        take_snapshot(make_subject(Net(), X, loss=lambda out: out["y"]), path)


class Numbers(nn.Module):
    def __init__(self, factor=2):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(5)), factor

    def forward(self, x):
        return x * self.weight, x.sum().item() * self.factor, self.factor


def test_numbers_of_python_are_outputs(tmp_path):
    path = tmp_path / "numbers.snapshot"
    take(path, Numbers())
    assert verify(path, Numbers()).verdict == "pass"
    assert {tensor for _, tensor in errors(verify(path, Numbers(3)))} == {"output.1", "output.2"}


def ties(x):
    return x.max(1).values, x.floor(), x.long()


def other_ties(x):
    return x.amax(1), x.floor() + 1, x.long() + 1


def test_a_difference_at_a_kink_is_not_judged_and_not_silent(tmp_path):
    path, ones = tmp_path / "ties.snapshot", torch.ones(6, 5)
    take(path, ties, ones)
    assert verify(path, ties, ones).verdict == "pass"
    unit = verify(path, other_ties, ones)
    expected = [("GC317", "output.1"), ("GC317", "output.2"), ("GC317", "input:x")]
    assert (unit.verdict, errors(unit)) == ("inconclusive", expected)
    assert verify(path, other_ties, ones, update=True).verdict == "pass"
    assert errors(verify(path, other_ties, ones)) == []


CONSTANT = """
import os

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("scale", torch.arange(3.0) + 1)
        self.shift = torch.tensor(0.5)
        self.unseeded = torch.randn(3, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4))))

    def forward(self, x):
        return self.inner(x) * self.scale + self.shift * self.unseeded


def example_inputs():
    return (torch.ones(2, 3),)
"""


# Each change has another length: Python takes the bytecode of a file with the same length and second for its own.
@pytest.mark.parametrize("change", [("+ 1", "* 1.001 + 1", "buffer:scale"), ("(0.5)", "(0.625)", "held:shift"), None])
def test_a_constant_that_the_code_changes_is_an_error_although_the_stored_one_is_used(tmp_path, change):
    file, path = tmp_path / "net.py", tmp_path / "net.snapshot"
    file.write_text(CONSTANT)
    options = TargetOptions(f"{file}:Net")
    take_snapshot(load_subject(options), path, options=options)
    if change is not None:
        file.write_text(CONSTANT.replace(change[0], change[1]))
    unit = verify_snapshot(path, load_subject(options), options=options)
    assert errors(unit) == ([] if change is None else [("GC315", change[2])])
    assert unit.verdict == ("pass" if change is None else "fail")
