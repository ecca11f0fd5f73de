"""Where a static form parts from eager: the node, its module and line, of planted differences and of real ones."""

import inspect
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from gradctl.core.findings import Location, Unit
from tests.compared import compared, comparing
from tests.functions import Reversal, Square, StraightThrough

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
HERE = "tests/diagnosis/test_localise_form.py"


class Applies(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Scaled(nn.Module):
    """A scale that is measured without gradient, or with one."""

    def __init__(self, without_gradient: bool) -> None:
        super().__init__()
        self.without_gradient = without_gradient

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.without_gradient):
            scale = x.abs().amax(1, keepdim=True) + 1
        return x / scale


class Hooked(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.fc = factor, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if h.requires_grad:
            h.register_hook(self.scaled)
        return h.tanh()

    def scaled(self, gradient: Tensor) -> Tensor:
        return self.factor * gradient


class Branching(nn.Module):
    def __init__(self, other: float) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.sin() * 2
        return x.sin() * self.other


class Captured(nn.Module):
    """Something else where ``is_captured`` says so: a factor of the value, or of its gradient alone."""

    def __init__(self, is_captured: Any, value: float = 1.0, gradient: float = 1.0) -> None:
        super().__init__()
        self.is_captured, self.value, self.gradient = is_captured, value, gradient

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        if self.is_captured():
            y = self.gradient * y + ((1 - self.gradient) * y).detach()
            y = y * self.value
        return y


class Scripted(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.mul(x.sin(), self.factor)
        return x.sin()


class Rooted(nn.Module):
    """NaN where it is captured, and only there."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            root = torch.sqrt(x.abs() + self.shift)
            return root - root
        return torch.zeros_like(x) * x


class Block(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 4), middle, nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(self.act(self.fc1(x)).mul(3.0)))


def nested(middle: nn.Module) -> nn.Module:
    """Return a model in which ``middle`` is 1.act."""
    torch.manual_seed(0)
    return nn.Sequential(Block(nn.Tanh()), Block(middle), nn.Linear(4, 2))


def line_of(text: str, source: Any) -> int:
    lines, first = inspect.getsourcelines(source)
    (offset,) = [number for number, line in enumerate(lines) if text in line]
    return first + offset


def at(module: str, op: str, text: str, source: Any) -> Location:
    file = Path(inspect.getsourcefile(source)).relative_to(Path.cwd()).as_posix()
    return Location(file=file, line=line_of(text, source), module=module, op=op)


def places(unit: Unit) -> set[Location | None]:
    return {each.location for each in unit.findings if each.severity == "error"}


@pytest.mark.parametrize(
    ("form", "middle", "place"),
    [
        ("export", Applies(StraightThrough), ("1.act", "StraightThrough", "return (4 * x)", StraightThrough)),
        ("export", Applies(Reversal), ("1.act", "Reversal", "return x.view_as", Reversal)),
        ("trace", Scaled(without_gradient=True), ("1.act", "aten.abs", "x.abs()", Scaled)),
        ("export", Hooked(2.0), ("1.act.fc", "aten.linear", "self.fc(x)", Hooked)),
        ("trace", Hooked(2.0), ("1.act.fc", "aten.linear", "self.fc(x)", Hooked)),
        ("script", Scripted(1.1), ("1.act", "aten.mul", "torch.mul(", Scripted)),
        (
            "export",
            Captured(torch.compiler.is_compiling, 1.1),
            ("1.act", "aten.mul.Tensor", "y * self.value", Captured),
        ),
        ("aot", Captured(torch.compiler.is_compiling, 1.1), ("1.act", "aten.mul.Tensor", "y * self.value", Captured)),
        ("trace", Captured(torch.jit.is_tracing, 1.1), ("1.act", "aten.mul", "y * self.value", Captured)),
        (
            "trace",
            Captured(torch.jit.is_tracing, gradient=1.1),
            ("1.act", "aten.mul", "y = self.gradient", Captured),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value if isinstance(value, str) else "",
)
def test_the_node_that_parts_from_eager_is_named_with_module_and_line(form, middle, place):
    unit = compared(form, nested(middle), X)
    assert places(unit) == {at(*place)}
    assert f"; first at {place[1]} in {place[0]}" in unit.findings[0].message


@pytest.mark.parametrize(
    ("form", "middle"),
    [
        ("export", Applies(Square)),
        ("trace", Scaled(without_gradient=False)),
        ("export", Hooked(1.0)),
        ("trace", Hooked(1.0)),
        ("script", Scripted(1.0)),
        ("export", Captured(torch.compiler.is_compiling)),
        ("aot", Captured(torch.compiler.is_compiling)),
        ("trace", Captured(torch.jit.is_tracing)),
    ],
)
def test_the_clean_twins_have_nothing_to_place(form, middle):
    unit = compared(form, nested(middle), X)
    assert (unit.verdict, places(unit)) == ("pass", set())


def test_what_eager_cuts_and_a_form_does_not_is_said_so():
    unit = compared("trace", nested(Scaled(without_gradient=True)), X)
    assert "; first at aten.abs in 1.act, where eager passes no gradient" in unit.findings[0].message


def test_a_baked_branch_is_placed_where_the_trace_goes_on_and_eager_does_not():
    def first(other: float) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Identity(), Branching(other)), nn.Linear(4, 2))

    (place,) = places(compared("trace", first(3.0), X))
    assert (place.module, place.op) == ("0.1", "aten.mul")
    assert place.line in (line_of("x.sin() * 2", Branching), line_of("* self.other", Branching))
    assert compared("trace", first(2.0), X).verdict == "pass"


def test_the_node_that_makes_the_first_nan_of_a_form_is_named():
    unit = compared("export", nested(Rooted(-100.0)), X)
    (place,) = places(unit)
    assert "; first at aten.sqrt in 1.act, which makes NaN or infinities of finite values" in unit.findings[0].message
    assert (place.module, place.op, place.line) == ("1.act", "aten.sqrt", line_of("torch.sqrt", Rooted))
    assert compared("export", nested(Rooted(1.0)), X).verdict == "pass"


def test_what_only_dynamo_does_is_placed_by_capturing_modules_alone():
    different = Captured(torch.compiler.is_dynamo_compiling, 1.1)
    worst = compared("aot", nested(different), X).findings[0]
    assert worst.location == at("1.act", "Captured", "def forward", Captured)
    assert "; first at Captured in 1.act" in worst.message


def test_a_module_that_a_list_holds_is_found_by_itself():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [nn.Linear(4, 4), Captured(torch.compiler.is_dynamo_compiling, gradient=-1.0), nn.Linear(4, 4)]
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    torch.manual_seed(0)
    worst = compared("aot", Listed(), X).findings[0]
    assert worst.location == at("parts.1", "Captured", "def forward", Captured)


def test_what_no_child_does_alone_is_the_models_own_code():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if torch.compiler.is_dynamo_compiling():
                y = 1.1 * y
            return self.second(y)

    worst = compared("aot", Own(), X).findings[0]
    assert worst.location == Location(file=HERE, line=line_of("def forward", Own), op="Own")


def test_batch_norm_in_training_mode_is_where_the_onnx_graph_leaves_eager():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    (place,) = places(compared("onnx", model, X))
    assert (place.module, "orm" in place.op) == ("1.1", True)
    assert compared("onnx", model.eval(), X).verdict == "pass"


def edited_program(path: Path, model: nn.Module, factor: float) -> Path:
    """Write the exported model with the factor of the last multiplication replaced."""
    program = torch.export.export(model, (X,), strict=False)
    *_, node = [each for each in program.graph.nodes if str(each.target).startswith("aten.mul")]
    node.args = (node.args[0], factor)
    program.graph_module.recompile()
    torch.export.save(program, path)
    return path


def test_a_changed_node_of_an_exported_graph_is_named(tmp_path):
    model = nested(nn.Tanh())
    unit = comparing(model, X).file(edited_program(tmp_path / "m.pt2", model, 3.3), trusted=True)
    assert places(unit) == {at("1", "aten.mul.Tensor", ".mul(3.0)", Block)}


def test_an_exported_graph_with_the_same_node_passes(tmp_path):
    model = nested(nn.Tanh())
    assert comparing(model, X).file(edited_program(tmp_path / "m.pt2", model, 3.0), trusted=True).verdict == "pass"


def test_a_gradient_lost_behind_an_operator_with_several_results_is_placed(tmp_path):
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=1)
            return torch.cat([left.sin(), right.exp()], dim=1)

    program = torch.export.export(nested(Split()), (X,), strict=False)
    (node,) = [each for each in program.graph.nodes if str(each.target).startswith("aten.exp")]
    with program.graph.inserting_after(node):
        cut = program.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    for user in [each for each in node.users if each is not cut]:
        user.replace_input_with(node, cut)
    program.graph_module.recompile()
    torch.export.save(program, tmp_path / "m.pt2")
    unit = comparing(nested(Split()), X).file(tmp_path / "m.pt2", trusted=True)
    assert places(unit) == {at("1.act", "aten.detach", "right.exp()", Split)}
    assert "first at aten.detach in 1.act, where eager passes a gradient" in unit.findings[0].message


def test_an_output_that_asks_for_no_gradient_any_more_is_placed_where_that_is_cut(tmp_path):
    model = nested(nn.Tanh())
    program = torch.export.export(model, (X,), strict=False)
    *_, node = [each for each in program.graph.nodes if each.op == "call_function"]
    with program.graph.inserting_after(node):
        cut = program.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    program.graph.output_node().replace_input_with(node, cut)
    (spec,) = program.graph_signature.output_specs
    spec.arg.name = cut.name
    program.graph_module.recompile()
    torch.export.save(program, tmp_path / "m.pt2")
    found = comparing(model, X).file(tmp_path / "m.pt2", trusted=True).findings
    (place,) = {(each.location.module, each.location.op) for each in found if each.tensor == "output"}
    assert place == ("2", "aten.detach")


def exported_onnx(model: nn.Module) -> onnx.ModelProto:
    program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    return program.model_proto


def test_a_changed_attribute_of_an_onnx_node_is_named(tmp_path):
    model = nested(nn.LayerNorm(4))
    graph = exported_onnx(model)
    (node,) = [each for each in graph.graph.node if each.op_type == "LayerNormalization"]
    (epsilon,) = [each for each in node.attribute if each.name == "epsilon"]
    path = tmp_path / "m.onnx"
    onnx.save(graph, path)
    assert comparing(model, X).file(path, trusted=False).verdict == "pass"
    epsilon.f = 0.5
    onnx.save(graph, path)
    unit = comparing(model, X).file(path, trusted=False)
    assert places(unit) == {at("1.act", "LayerNormalization", "self.act(", Block)}


def test_a_changed_constant_of_an_onnx_graph_is_placed_at_the_first_node_that_takes_it(tmp_path):
    model = nested(nn.Tanh())
    graph = exported_onnx(model)
    used = {name for node in graph.graph.node if node.op_type == "Mul" for name in node.input}
    (constant,) = [each for each in graph.graph.initializer if each.name in used]
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * 1.1, constant.name))
    onnx.save(graph, tmp_path / "m.onnx")
    unit = comparing(model, X).file(tmp_path / "m.onnx", trusted=False)
    assert places(unit) == {at("0", "Mul", ".mul(3.0)", Block)}


def test_an_onnx_graph_of_another_tool_has_its_node_and_no_module_or_line(tmp_path):
    model = nested(nn.LayerNorm(4))
    graph = exported_onnx(model)
    for node in graph.graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.5
    onnx.save(graph, tmp_path / "m.onnx")
    (place,) = places(comparing(model, X).file(tmp_path / "m.onnx", trusted=False))
    assert (place.op, place.file) == ("LayerNormalization", None)


def test_a_form_that_raises_is_placed_at_the_users_line():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.jit.is_tracing():
                return x.sin()
            return x.sin() + torch.linalg.cholesky(x[:4].sum() * torch.eye(4)).sum() * 0

    x = X * X[:4].sum().sign()
    unit = compared("trace", Fixed(), x)
    found = next(each for each in unit.findings if each.code == "GC303")
    assert (found.location.file, found.location.line) == (HERE, line_of("cholesky", Fixed))


def test_locating_leaves_no_trace_in_what_is_compared_next():
    held = comparing(nested(Applies(StraightThrough)), X)
    held.form("export", named=True)
    assert held.form("trace", named=True).verdict == "pass"
    assert all(
        not (leaf.tensor._backward_hooks or {}) for trial in held.reference.trials for leaf in trial.instance.leaves
    )
