"""The Python API, ``import gradctl``: checks of a model in memory, in this process, which return a report.

A compiler that crashes takes this process with it; ``gradctl compare`` and ``gradctl check`` run it in one of its own.
Torch is imported when a check is called.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradctl.check_report import CheckReport
from gradctl.core.errors import GradctlError, TargetError, nearest
from gradctl.core.findings import Unit
from gradctl.core.names import DTYPES, OPTIMIZERS, RANK_FORMS, RANK_FORMS_TEXT, SEVERITIES, Severity
from gradctl.core.target_options import DEFAULTS

if TYPE_CHECKING:
    from torch import Tensor

    from gradctl.core.allows import Allows
    from gradctl.subject.inputs.dynamic_sizes import Dynamic
    from gradctl.subject.inputs.sizes import Sizes
    from gradctl.subject.subject import Subject

_Check = Callable[["Subject", "Allows"], Sequence[Unit]]
_SizesGiven = str | Mapping[str, int | Sequence[int]]
_MOST_SIZES: int = DEFAULTS["max_sizes"]


def gradcheck(
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    allow: str | Sequence[str] = (),
    fail_on: Severity = "error",
    thorough: bool = False,
    probes: int = 2,
    tensor: str = "*",
    rtol: float | None = None,
    atol: float | None = None,
    sizes: _SizesGiven | None = None,
    max_sizes: int = _MOST_SIZES,
) -> CheckReport:
    """Return whether autograd's gradients are the derivatives of ``model``, every parameter and float input by name.

    Args:
        model: a module, a function of tensors, or an ``autograd.Function``; never run itself, but a copy of it.
        inputs: a tuple or list by position, a mapping by keyword, or one tensor.
        kwargs: more inputs by keyword.
        loss: ``loss(outputs)`` or ``loss(outputs, *args, **kwargs)`` to a scalar; None: a random weighted sum.
        seed: of every random generator, set before each call and put back at the end.
        allow: accepted findings, ``CODE`` or ``CODE:NAME``, as the report prints them after ``--allow``.
        fail_on: the least severe finding that fails.
        thorough: check each tensor by itself, also if all tensors together agree.
        probes: number of random directions.
        tensor: glob of the names to judge, for example ``param:fc1.*``.
        rtol, atol: accept an error up to atol + rtol ||g|| (Euclidean norm of one gradient).
        sizes: repeat the check at these sizes of the inputs, and in other layouts: ``{"batch": [1, 2, 7]}`` (axis 0),
            ``{"seq@x:1": [1, 17]}``, or the text of ``--sizes``.
        max_sizes: the most combinations of sizes; of more, a sample with each value.

    Raises:
        GradctlError: the model cannot be checked on these inputs, or an argument is invalid. It is raised from the
            error of the user's code, if that raised.
    """
    __tracebackhide__ = True

    def check(subject: Subject, allows: Allows) -> list[Unit]:
        from gradctl.gradients.size_sweep import gradcheck_at_sizes as judge

        if probes < 1:
            raise _unfit("probes", probes, "Give a whole number from 1.")
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
                raise _unfit(name, tolerance, "Give a finite number from 0.")
        unit = judge(
            subject,
            _sizes(sizes, max_sizes),
            limit=max_sizes,
            allows=allows,
            fail_on=fail_on,
            thorough=thorough,
            probes=probes,
            tensor=tensor,
            rtol=rtol,
            atol=atol,
        )
        return [unit]

    return _report("gradcheck", check, model, inputs, kwargs=kwargs, loss=loss, seed=seed, allow=allow, fail_on=fail_on)


def compare(
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
    *,
    forms: str | Sequence[str] | None = None,
    candidate: Callable[..., Any] | None = None,
    map: Mapping[str, str] | None = None,
    own_weights: bool = False,
    steps: int | None = None,
    optimizer: str | Callable[..., Any] | None = None,
    variants: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    allow: str | Sequence[str] = (),
    fail_on: Severity = "error",
    sizes: _SizesGiven | None = None,
    max_sizes: int = _MOST_SIZES,
) -> CheckReport:
    """Return whether static forms of ``model``, or another implementation, compute the same outputs, gradients, state.

    Without ``candidate``, eager's own gradients are checked first. A form that cannot capture the model is skipped with
    the reason, or inconclusive if it was named.

    Args:
        model, inputs, kwargs, loss, seed, allow, fail_on, sizes, max_sizes: as in ``gradcheck``.
        forms: some of trace, script, export, aot, compile, onnx (by default these), export-joint, onnx-joint, openvino,
            openvino-joint, executorch, executorch-joint.
        candidate: another implementation, which is compared with ``model`` in place of the forms, or trained like it.
            It runs on the inputs and with the parameters of ``model``, which are paired by name, else by order and
            shape.
        map: names of the parameters of ``model`` and of the candidate, where they differ; ``*`` stands for any text.
        own_weights: whether the candidate keeps its own parameters.
        steps: compare variants of the training step with the plain step for so many steps, in place of the forms.
        optimizer: of these steps: adamw (by default), adam, sgd, or ``factory(parameters)``.
        variants: of the step: names, or functions ``step(model, optimizer, *args, **kwargs) -> loss``; None: all names.

    Raises:
        GradctlError: as ``gradcheck``; GC123 or GC124 if the candidate has other inputs, outputs or parameters; GC143
            to GC145 if there is nothing to train, or for the optimizer or a variant.
    """
    __tracebackhide__ = True

    def check(subject: Subject, allows: Allows) -> list[Unit]:
        if steps is not None:
            unfit: dict[str, Any] = {"forms": forms, "sizes": sizes}
            unfit |= {} if candidate is not None else {"map": map, "own_weights": own_weights}
            for name, other in unfit.items():
                if other:
                    raise _unfit(name, other, "It does not apply to training steps; omit it or steps.")
            settings: dict[str, Any] = {"allows": allows, "fail_on": fail_on, "own_values": own_weights}
            return _compare_steps(subject, steps, optimizer, variants, candidate=candidate, map=map or {}, **settings)
        for name, one in (("optimizer", optimizer), ("variants", variants)):
            if one is not None:
                raise _unfit(name, one, "It applies to training steps. Give steps, too.")
        from gradctl.commands.compare import DEFAULT_STATIC_FORMS, STATIC_FORMS
        from gradctl.commands.compare_sizes import compare_at_sizes

        if candidate is not None:
            if forms is not None:
                raise _unfit("forms", forms, "A candidate is compared itself; omit one of them.")
            sized = {"sizes": _sizes(sizes, max_sizes), "max_sizes": max_sizes, "own_values": own_weights}
            return [_compare_candidate(subject, candidate, map or {}, allows=allows, fail_on=fail_on, **sized)]
        for name, given in (("map", map), ("own_weights", own_weights)):
            if given:
                raise _unfit(name, given, "It applies to a candidate, and there is none.")
        chosen = DEFAULT_STATIC_FORMS if forms is None else _texts(forms)
        named = [form for form in STATIC_FORMS if form not in RANK_FORMS]
        for form in chosen:
            if form not in STATIC_FORMS:
                raise _unfit(
                    "forms", form, f"There are {', '.join(named)}; {RANK_FORMS_TEXT}.", nearest(form, STATIC_FORMS)
                )
        return compare_at_sizes(
            subject,
            _sizes(sizes, max_sizes),
            limit=max_sizes,
            forms=chosen,
            named=forms is not None,
            allows=allows,
            fail_on=fail_on,
        )

    return _report("compare", check, model, inputs, kwargs=kwargs, loss=loss, seed=seed, allow=allow, fail_on=fail_on)


def _compare_steps(
    subject: Subject,
    steps: Any,
    optimizer: Any,
    variants: Any,
    *,
    candidate: Callable[..., Any] | None,
    map: Mapping[str, str],
    own_values: bool,
    **judgement: Any,
) -> list[Unit]:
    from gradctl.commands.compare_steps import TrainedCandidate, compare_steps
    from gradctl.subject.loading.load import make_candidate

    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise _unfit("steps", steps, "Give a whole number from 1.")
    given = () if variants is None else (variants,) if isinstance(variants, str) or callable(variants) else variants
    settings = {"optimizer": OPTIMIZERS[0] if optimizer is None else optimizer, "variants": given, **judgement}
    if candidate is None:
        return compare_steps(subject, steps, **settings)
    made = make_candidate(candidate, subject)
    paired: TrainedCandidate = {"candidate": made, "renamed": _pairs(map), "own_values": own_values}
    with _left_as_it_was(made):
        return compare_steps(subject, steps, candidate=paired, **settings)


def _pairs(renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    from gradctl.comparison.candidates.pairing import parse_map

    if not isinstance(renamed, Mapping):
        raise _unfit("map", renamed, "Give a mapping from names of the model to names of the candidate.")
    try:
        return parse_map(f"{old}={new}" for old, new in renamed.items())
    except ValueError as error:
        raise TargetError("GC118", f"map: {error}") from None


def _compare_candidate(
    subject: Subject,
    candidate: Callable[..., Any],
    renamed: Mapping[str, str],
    **settings: Any,
) -> Unit:
    from gradctl.commands.compare_candidate import compare_candidate
    from gradctl.subject.loading.load import make_candidate

    pairs = _pairs(renamed)
    other = make_candidate(candidate, subject)
    with _left_as_it_was(other):
        return compare_candidate(subject, other, renamed=pairs, **settings)


def export(
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic: str | Sequence[str] = (),
    keep_unverified: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow: str | Sequence[str] = (),
    fail_on: Severity = "error",
) -> CheckReport:
    """Export ``model`` to an ONNX file, and return whether its outputs in onnxruntime are those of eager.

    The file is written only if they are; otherwise an existing file does not change.

    Args:
        model, inputs, kwargs, seed, allow, fail_on: as in ``gradcheck``.
        path: the file, ``.onnx``.
        opset: version of ONNX's own operators; None: the default of torch.
        dynamic: symbolic sizes of inputs, ``x:0=batch``.
        keep_unverified: write the file also if it does not agree with eager.

    Raises:
        GradctlError: as ``gradcheck``; GC131 if the file cannot be written.
    """
    __tracebackhide__ = True

    def check(subject: Subject, allows: Allows) -> list[Unit]:
        from gradctl.commands.export import export as export_verified

        output = Path(path)
        if output.suffix.lower() != ".onnx":
            raise _unfit("path", str(output), "Give a file that ends in .onnx.")
        if opset is not None and opset < 1:
            raise _unfit("opset", opset, "Give a whole number from 1.")
        written = export_verified(
            subject,
            output,
            opset=opset,
            dynamic=_free_sizes(dynamic),
            keep_unverified=keep_unverified,
            allows=allows,
            fail_on=fail_on,
        )
        return [written.unit]

    return _report("export", check, model, inputs, kwargs=kwargs, loss=None, seed=seed, allow=allow, fail_on=fail_on)


def snapshot(
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    values: bool = True,
    full: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> CheckReport:
    """Record the outputs, gradients and buffer updates of ``model`` in a file, for ``verify``.

    Args:
        model, inputs, kwargs, loss, seed: as in ``gradcheck``.
        path: the file; an existing one is replaced. The values are written beside it.
        values: store parameters, buffers and inputs (up to 64 MB); if not, only their digests.
        full: store every recorded tensor, too.

    Raises:
        GradctlError: as ``gradcheck``; GC136 if the model is not deterministic, GC131 if a file cannot be written.
    """
    __tracebackhide__ = True

    def check(subject: Subject, allows: Allows) -> list[Unit]:
        from gradctl.commands.check_snapshot import write_snapshot

        return [write_snapshot(Path(path), subject, values=values, full=full)]

    return _report("snapshot", check, model, inputs, kwargs=kwargs, loss=loss, seed=seed, allow=(), fail_on="error")


def verify(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    update: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int | None = None,
    allow: str | Sequence[str] = (),
    fail_on: Severity = "error",
) -> CheckReport:
    """Return whether ``model`` still computes what a snapshot holds, on the parameters and inputs of the snapshot.

    Args:
        path: the snapshot.
        model, kwargs, allow, fail_on: as in ``gradcheck``.
        inputs: as in ``gradcheck``; None for those of the snapshot, if each input is one tensor.
        device, dtype: run there, ``cuda``, or in this dtype, ``bf16``, and compare with the float64 of the snapshot.
        update: write the snapshot if it is missing, differs, or is of a model with other parameters.
        loss: the one that the snapshot was taken with.
        seed: None for that of the snapshot.

    Raises:
        GradctlError: as ``gradcheck``; GC133 to GC135 if the snapshot cannot be read, is of another model, or has no
            values.
    """
    __tracebackhide__ = True

    def check(subject: Subject, allows: Allows) -> list[Unit]:
        from gradctl.commands.check_snapshot import check_snapshot

        return [
            check_snapshot(
                Path(path), subject, device=device, dtype=dtype, update=update, allows=allows, fail_on=fail_on
            )
        ]

    if update and (device is not None or dtype is not None):
        raise _unfit("update", update, "The CPU computes what a snapshot holds; omit device and dtype.")
    if dtype is not None and dtype not in DTYPES:
        raise _unfit("dtype", dtype, f"There are {', '.join(DTYPES)}.", nearest(str(dtype), DTYPES))
    given, own_seed = _of_snapshot(Path(path), () if inputs is None and kwargs else inputs, update=update)
    chosen = own_seed if seed is None else seed
    return _report("verify", check, model, given, kwargs=kwargs, loss=loss, seed=chosen, allow=allow, fail_on=fail_on)


def _of_snapshot(path: Path, inputs: Any, *, update: bool) -> tuple[Any, int]:
    """Return the inputs that are given, else those of the snapshot, and its seed; 0 if it is yet to be written."""
    __tracebackhide__ = True
    from gradctl.snapshots.snapshot_file import read
    from gradctl.snapshots.stored_values import stored_inputs

    try:
        stored = read(path)
        return stored_inputs(path, stored) if inputs is None else inputs, stored.header.seed
    except GradctlError as error:
        if update and inputs is not None:
            return inputs, 0
        raise error.with_traceback(None) from None


def _report(
    command: str,
    check: _Check,
    model: Callable[..., Any],
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None,
    loss: Callable[..., Any] | None,
    seed: int,
    allow: str | Sequence[str],
    fail_on: str,
) -> CheckReport:
    """Return the report of one check; what the user's code raised keeps the user's frames, and no others."""
    __tracebackhide__ = True
    from gradctl.core.assembly import make_report
    from gradctl.subject.frames import keep_user_frames
    from gradctl.subject.loading.load import device_of, make_subject

    try:
        allows = _allows(allow)
        if fail_on not in SEVERITIES:
            raise _unfit("fail_on", fail_on, f"There are {', '.join(SEVERITIES)}.", nearest(str(fail_on), SEVERITIES))
        if not isinstance(seed, int):
            raise _unfit("seed", seed, "Give a whole number.")
        subject = make_subject(model, inputs, kwargs=kwargs, loss=loss, seed=seed)
        with _left_as_it_was(subject):
            units = check(subject, allows)
    except GradctlError as error:
        raise error.with_traceback(None) from keep_user_frames(error.__cause__)
    report = make_report(command, units, allows, seed=seed, device=device_of(subject), fail_on=fail_on)
    return CheckReport.of(report)


@contextmanager
def _left_as_it_was(subject: Subject) -> Iterator[None]:
    """Put back what functions close over: a module is copied, and what a function refers to is not.

    Autograd is on, whatever the caller has switched off.
    """
    import torch

    from gradctl.subject.instance import restore_shared
    from gradctl.subject.signature import module_of
    from gradctl.subject.state import State

    callables = (subject.model, subject.loss)
    state = State([each for each in callables if each is not None and module_of(each) is None])
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        restore_shared()
        state.restore()


def _allows(allow: str | Sequence[str]) -> Allows:
    """Return the accepted findings, each of a rule that there is."""
    from gradctl.core.allows import Allows
    from gradctl.rules.catalogue import allow_problem

    allows = Allows(_texts(allow))
    for text in allows.texts:
        if problem := allow_problem(text):
            raise GradctlError("GC151", f"allow={text!r}: {problem}")
    return allows


def _free_sizes(dynamic: str | Sequence[str]) -> Dynamic:
    from gradctl.subject.inputs.dynamic_sizes import parse_dynamic

    try:
        return parse_dynamic(_texts(dynamic))
    except ValueError as error:
        raise TargetError("GC118", f"dynamic: {error}") from None


def _sizes(sizes: _SizesGiven | None, most: int) -> Sizes:
    from gradctl.subject.inputs.sizes import sizes_from

    if most < 2:
        raise _unfit("max_sizes", most, "Give a whole number from 2.")
    return sizes_from(sizes)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as several."""
    return (given,) if isinstance(given, str) else tuple(given)


def _unfit(name: str, value: object, remedy: str, near: str = "") -> TargetError:
    return TargetError("GC118", f"{name}={value!r} cannot be{near}. {remedy}")
