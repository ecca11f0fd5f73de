"""The place where a static form diverges from eager: the first value, or backward the first adjoint, that differs.

One run of each on the same inputs, every value a sketch of a few numbers, so that memory is that of one training step.
If a form is opaque, modules are captured alone instead (``localise_modules``).

Not found: a difference that only float64 shows, or in dtype alone, or inside of a loop or branch that is one node.
"""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import torch

from gradctl.comparison.difference import ModelDifference
from gradctl.comparison.form_comparison import FormComparison
from gradctl.comparison.program import cotangents_of
from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding, Location
from gradctl.diagnosis.causes import key_of
from gradctl.diagnosis.localise_modules import AloneModules, capture_with
from gradctl.diagnosis.paired_values import Divergence, PairedValues
from gradctl.forms.exported import export, export_values
from gradctl.forms.form import CannotCapture, Captured, Form, to_float64
from gradctl.forms.onnx import onnx_values
from gradctl.forms.source_location import SourceLocation, line_in
from gradctl.forms.table import form_named
from gradctl.forms.torchscript import torchscript_values
from gradctl.gradients.functions.function_part import function_name
from gradctl.gradients.gradient_findings import location
from gradctl.numerics.sketch import Sketcher
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.subject.frames import is_users
from gradctl.subject.instance import Instance, native_dtype
from gradctl.subject.state import State
from gradctl.tracing.graph import CallSite, modules_by_identity
from gradctl.tracing.values import ProgramValues, ValueWatch

_T = TypeVar("_T")
_GRAPHS: dict[str, ModuleType] = {
    "trace": torchscript_values,
    "script": torchscript_values,
    "export": export_values,
    "onnx": onnx_values,
}
# After this many times the seconds of the comparison, modules are no longer captured alone.
_TIMES_THE_COMPARISON = 3.0
_LEAST_SECONDS = 2.0
_DIFFERENCES = ("GC301", "GC302", "GC402", "GC403")
# A difference of a tensor is followed through values that differ by a thousandth of it, or by more than this.
_PART_OF_THE_ERROR = 1e-3
_ROUNDING_EPSILONS = 64.0
_COARSEST = 1e-5
_BAKED = 1e-7
_ORT_NODE = re.compile(r"Name:'([^']+)'")


def locate_findings(
    findings: Sequence[Finding], comparison: FormComparison, form: Form, *, seconds: float = math.inf
) -> list[Finding]:
    """Return the findings about a form with the first place at which it diverges from eager.

    Args:
        findings: worst first; those without a difference are not changed.
        comparison: of the form.
        form: captures modules alone.
        seconds: of the comparison, which limit the seconds of this.
    """
    found = [_raised(each, comparison) for each in findings]
    about = _without_place(found, comparison)
    deadline = time.perf_counter() + max(_LEAST_SECONDS, _TIMES_THE_COMPARISON * seconds)
    for numbers in _by_trial_and_call(about):
        divergences = _of_graph(comparison, [(found[number], about[number]) for number in numbers])
        for number, divergence in zip(numbers, divergences, strict=True):
            if divergence is not None:
                found[number] = _with_divergence(found[number], divergence)
    first_open = {found[number].quantity: number for number in reversed(about) if found[number].location is None}
    for number in sorted(first_open.values()):
        place = _of_modules(comparison, form, found[number], about[number], deadline)
        found[number] = found[number] if place is None else with_place(found[number], place)
    return found


def _without_place(findings: Sequence[Finding], comparison: FormComparison) -> dict[int, ModelDifference]:
    """Return the differences that have no place yet, by the positions of their findings."""
    return {
        number: comparison.worst[key_of(each)]
        for number, each in enumerate(findings)
        if each.code in _DIFFERENCES and each.location is None and key_of(each) in comparison.worst
    }


def _by_trial_and_call(about: Mapping[int, ModelDifference]) -> Iterable[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for number, each in about.items():
        groups.setdefault((id(each.trial), each.call), []).append(number)
    return groups.values()


def _of_graph(comparison: FormComparison, about: Sequence[tuple[Finding, ModelDifference]]) -> list[Divergence | None]:
    """Return the divergence of the graph of a form from eager, for tensors of one trial and call."""
    found: list[Divergence | None] = [None] * len(about)
    captured, state = comparison.captured, comparison.program.state
    if captured.form == "aot":  # opaque; torch.export traces the same graph
        captured = _unless_it_raises(lambda: export.capture(comparison.reference.instance())) or captured
        state = State([captured.model])
    # Float64 separates any difference in meaning from rounding, if the model runs in it.
    for is_float64 in (True, False) if captured.form in _GRAPHS else ():
        run = partial(_paired, comparison, captured, state, [each for _, each in about], is_float64=is_float64)
        paired = _unless_it_raises(run)
        if paired is not None:
            found = [before or _divergence(paired, *each) for before, each in zip(found, about, strict=True)]
        if all(found):
            break
    state.restore()
    return found


def _unless_it_raises(call: Callable[[], _T]) -> _T | None:
    """Return the result of a call that runs the user's model or a form, which may raise anything; None if it does."""
    try:
        return call()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def _divergence(paired: PairedValues, finding: Finding, difference: ModelDifference) -> Divergence | None:
    if finding.quantity == "gradient":
        return paired.first_value() or paired.first_adjoint(str(finding.tensor))
    if difference.requires_grad is not None and not (difference.exceeds or difference.means_another):
        return paired.first_cut_anywhere()
    return paired.first_value() or (paired.first_value_anywhere() if finding.quantity == "buffer" else None)


def _paired(
    comparison: FormComparison,
    captured: Captured,
    state: State,
    differences: Sequence[ModelDifference],
    *,
    is_float64: bool,
) -> PairedValues:
    """Return both programs' values at the inputs and call on which a tensor is worst; raise if one does not run so."""
    difference, reference = differences[0], comparison.reference
    trial, sketcher, context = difference.trial, Sketcher(), nullcontext if not is_float64 else reference.promoting
    state.restore()
    if is_float64:
        if trial.float64 is None:
            raise CannotCapture("the model does not run in float64.")
        captured = to_float64(form_named(captured.form), captured, reference.instance(promoted=True))
        state = State([captured.model])
    form = trial.float64 if is_float64 and trial.float64 is not None else trial.instance
    eager = Instance(trial.instance.subject, promoted=is_float64, input_mode=reference.input_mode, keep_hooks=True)
    names = {id(tensor): leaf.name for leaf in eager.leaves for tensor in (leaf.tensor, *leaf.sharing)}
    programs: list[ProgramValues] = []
    with ValueWatch(sketcher, names) as watch:

        def called(*args: Any, **kwargs: Any) -> Any:
            programs[:] = [ProgramValues(modules_by_identity(eager.model), watch)]
            with programs[0].watching():
                result = eager.model(*args, **kwargs)
            programs[0].see_outputs(result)
            return result

        _run(called, eager, State([]), difference, context)
    with ValueWatch(sketcher, _collecting(form, captured)) as watch:
        call, run_of = _GRAPHS[captured.form].watch_values(captured, watch)
        _run(call, form, state, difference, context)
        run = run_of()
    tolerance = _tolerance(torch.float64 if is_float64 else native_dtype(reference.subject), differences)
    return PairedValues(programs[0].values, programs[0].inside, run, tolerance)


def _collecting(instance: Instance, captured: Captured) -> dict[int, str]:
    """Return the names of leaves by identity of the tensors that collect their gradients in a form."""
    names = {id(leaf.tensor): leaf.name for leaf in instance.leaves if not leaf.name.startswith("param:")}
    for leaf in instance.leaves:
        for name in (leaf.name, *leaf.tied):
            tensor = captured.parameters.get(name.removeprefix("param:"))
            names |= {id(tensor): leaf.name} if tensor is not None and name.startswith("param:") else {}
    return names


def _run(
    call: Callable[..., Any],
    instance: Instance,
    state: State,
    difference: ModelDifference,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Make calls in a row from the state of a comparison, and the backward of the last."""
    instance.restore()
    state.restore()
    outputs = {}
    for _ in range(difference.call):
        args, kwargs = instance.inputs()
        with context(), torch.enable_grad():
            outputs = dict(instance.call(call, args, kwargs))
    differentiable = difference.trial.native[0].differentiable
    asked = {name: t for name, t in outputs.items() if t.requires_grad and name in differentiable}
    cotangents = cotangents_of(outputs, instance.subject.seed)
    if asked:
        with context():
            torch.autograd.backward(list(asked.values()), [cotangents[name] for name in asked])
    for leaf in instance.leaves:
        leaf.take_gradient()


def _tolerance(dtype: torch.dtype, differences: Iterable[ModelDifference]) -> float:
    """Return the relative distance up to which two values are equal: rounding, less than what was found."""
    smallest = min((each.error for each in differences if 0 < each.error < math.inf), default=math.inf)
    # Constants that a form bakes in keep their dtype, and are off by 3e-8 in float64.
    rounding = _BAKED if dtype == torch.float64 else _ROUNDING_EPSILONS * torch.finfo(dtype).eps
    return max(rounding, min(_PART_OF_THE_ERROR * smallest, _COARSEST))


def _of_modules(
    comparison: FormComparison, form: Form, finding: Finding, difference: ModelDifference, deadline: float
) -> SourceLocation | None:
    """Return the innermost module that differs alone; for inductor, which compiles slowly, whose parameter it is."""
    captured = comparison.captured
    if captured.form == "compile":
        path = str(finding.tensor).removeprefix("param:")
        return SourceLocation(path.rpartition(".")[0]) if path != finding.tensor and "." in path else None
    if captured.form not in ("trace", "script", "aot"):
        return None
    alone = AloneModules(comparison.reference, capture_with(form), difference.trial, finding, difference, deadline)
    return alone.innermost()


def _with_divergence(finding: Finding, divergence: Divergence) -> Finding:
    """Return a finding with the node of a form, in the words of the user's program where eager has a counterpart."""
    place, eager = divergence.node.place, divergence.eager
    if place is None:  # an output of the graph is an input, a parameter or a constant
        return finding
    place = _in_eagers_words(place, divergence)
    if eager is not None and eager.function is not None:
        place = replace(place, op=function_name(eager.function))
    said = {"eager": ", where eager passes no gradient", "form": ", where eager passes a gradient", None: ""}
    breaks = ", which makes NaN or infinities of finite values" if divergence.breaks else ""
    return with_place(finding, place, breaks or said[divergence.cut])


def _in_eagers_words(place: SourceLocation, divergence: Divergence) -> SourceLocation:
    """Return a node's place, and eager's for what the node does not say of itself."""
    if divergence.instead is not None:
        return _place_of_call(divergence.instead)
    if divergence.eager is None or divergence.eager.origin is None:
        return replace(place, module=place.module or divergence.module or "")
    own = _place_of_call(divergence.eager.origin)
    file, line = (place.file, place.line) if place.file is not None else (own.file, own.line)
    return SourceLocation(place.module or own.module, place.op or own.op, file, line)


def _place_of_call(call: CallSite) -> SourceLocation:
    return SourceLocation(call.module or "", call.op, *(call.place or (None, None)))


def with_place(finding: Finding, place: SourceLocation, said: str = "") -> Finding:
    """Return a finding with a place, in its location and in a clause of its message, which ``said`` ends."""
    inside = f" in {place.module}" if place.module else ""
    at = f" at {place.op}" if place.op else ""
    clause = f"first{at}{inside}{said}" if at or inside else f"in the model's own code{said}"
    return msgspec.structs.replace(
        finding, message=f"{finding.message.removesuffix('.')}; {clause}.", location=_location(place)
    )


def _location(place: SourceLocation) -> Location | None:
    source = (place.file, place.line) if place.file is not None and place.line is not None else None
    return location(source, op=place.op, module=place.module or None)


def _raised(finding: Finding, comparison: FormComparison) -> Finding:
    """Return a finding on a form that raises with the user's line: of the stack, of TorchScript's, or of the node."""
    if finding.code != "GC303":
        return finding
    error = next(iter(comparison.raised.values()))
    frames = [(each.filename, each.lineno or 0) for each in traceback.extract_tb(error.__traceback__)]
    users = [frame for frame in frames if is_users(frame[0])]
    source = users[-1] if users else line_in(str(error))
    place = SourceLocation("", None, *source) if source is not None else _raising_node(str(error), comparison.captured)
    return finding if place is None else msgspec.structs.replace(finding, location=_location(place))


def _raising_node(message: str, captured: Captured) -> SourceLocation | None:
    """Return the node that onnxruntime names in what it raises."""
    name = _ORT_NODE.search(message)
    if name is None or not isinstance(captured.artifact, OnnxFile):
        return None
    nodes = captured.artifact.model.graph.node
    return next((onnx_values.node_location(node) for node in nodes if node.name == name[1]), None)
