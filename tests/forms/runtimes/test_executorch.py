"""ExecuTorch as a form: right models agree, what it loses is found, what it cannot run is refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.core.target_options import TargetOptions
from gradctl.forms.exported import export_joint
from gradctl.subject.instance import Instance
from gradctl.subject.loading.load import load_subject
from gradctl.subject.subject import Subject
from tests.compared import causes, compared, different, verdicts

X = torch.tensor([[0.5, -1.0, 2.0], [-3.0, 0.0, 1.0]])


class Counter(nn.Module):
    """The result depends on the number of calls: the initial value of a buffer that the forward changes."""

    def __init__(self, start: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.tensor(start))

    def forward(self, x: Tensor, times: int = 1) -> dict[str, Tensor]:
        self.calls.add_(1)
        return {"scaled": self.fc(x) * self.calls * times}


class Window(nn.Module):
    """A cache as decoders have it: a buffer that keeps the last rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)
        self.register_buffer("rows", torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.rows.copy_(torch.cat([self.rows[1:], x[:1]]))
        return self.fc(self.rows)


# ------------------------------------------------------------------ without ExecuTorch


def test_a_joint_program_stays_valid_if_a_pass_renames_its_values(tmp_path):
    """As the passes of ExecuTorch do, which rejected one whose calls name values that its graph does not have."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    captured = export_joint.export_program(Instance(Subject("net", model, args=(X,))))
    export_joint.save(captured, tmp_path / "joint.pt2")
    program = torch.export.load(tmp_path / "joint.pt2").run_decompositions()
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        program.graph_signature.replace_all_uses(node.name, f"edge_{node.name}")
        node.name = f"edge_{node.name}"
    renamed = torch.export.ExportedProgram(  # raises SpecViolationError if it is not valid
        program.graph_module, program.graph, program.graph_signature, {}, {}, program.module_call_graph
    )
    assert all(name.startswith("edge_clone") for name in renamed.graph_signature.user_outputs)


# ------------------------------------------------------------------ right models


@pytest.fixture
def executorch():
    return pytest.importorskip("executorch")


@pytest.mark.parametrize("form", ["executorch", "executorch-joint"])
def test_a_convolution_agrees(executorch, form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2))
    unit = compared(form, model, torch.randn(2, 2, 4, 4))
    assert (unit.verdict, unit.form) == ("pass", form)
    assert set(verdicts(unit).values()) == ({"same"} if form == "executorch-joint" else set())
    assert {each.quantity for each in unit.tensors} >= {"output"}


def test_numbers_and_unused_inputs_are_at_their_places(executorch):
    def model(
        b: Tensor, times: int, unused: Tensor, a: Tensor, negate: bool, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        return a - b * times, b, (a if negate else b).sum(), a > 0

    unit = compared("executorch", model, X, 3, X + 1, X * 2, True, None)
    assert unit.verdict == "pass"


@pytest.mark.parametrize("model", [Counter(0.0), Window()], ids=["counter", "window"])
def test_state_is_kept_between_calls_and_reset_between_runs(executorch, model):
    assert compared("executorch", model, X).verdict == "pass"


# ------------------------------------------------------------------ what it loses


def test_a_lost_initial_value_of_a_buffer_is_found_with_its_cause(executorch):
    """ExecuTorch 1.5 writes no initial values of buffers that the program changes, and warns of it."""
    unit = compared("executorch", Counter(5.0), X)
    assert different(unit) == {"output.scaled": "GC301"}
    assert causes(unit) == {"GC211"}
    (error,) = (each for each in unit.findings if each.severity == "error")
    assert "executorch starts with other values of calls than the model has" in error.message
    assert "InitializedMutableBufferPass(['calls'])" in error.hint


def test_the_joint_graph_has_state_as_inputs_and_loses_nothing(executorch):
    unit = compared("executorch-joint", Counter(5.0), X)
    assert unit.verdict == "pass"
    assert ("buffer", "buffer:calls") in {(each.quantity, each.tensor) for each in unit.tensors}


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            torch.linalg.svdvals,
            "the model is exported, and ExecuTorch refuses the program: operator aten._linalg_svd.default is not in "
            "Core ATen.",
        ),
        (lambda x: x.sort().values, "ExecuTorch has no portable kernel for aten::sort.values."),
    ],
)
def test_what_it_cannot_run_is_one_sentence(executorch, model, said):
    unit = compared("executorch", model, X)
    assert (unit.status, unit.verdict) == ("unsupported", "inconclusive")
    assert unit.reason.startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["executorch", "executorch-joint"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer", "tied_weights", "accumulation"])
def test_a_right_sample_agrees(executorch, name, form):
    subject = load_subject(TargetOptions(f"sample_models/{name}.py"))
    assert Comparing(subject, Allows(())).form(form, named=True).verdict == "pass"
