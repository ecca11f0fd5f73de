"""From what the user typed to a ``Subject``: target, arguments, weights, mode, device, inputs, loss, in this order;
and from a model and its inputs, as a program in Python has them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradctl.core.errors import TargetError, is_out_of_memory, listed
from gradctl.core.findings import Finding, note
from gradctl.core.target_files import parse_target
from gradctl.core.target_options import TargetOptions
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.example import (
    Inputs,
    inputs_beside,
    inputs_from_beside,
    inputs_from_call,
    inputs_from_file,
    inputs_from_specs,
)
from gradctl.subject.inputs.proposal import no_inputs
from gradctl.subject.inputs.specification import InputSpec, parse_input
from gradctl.subject.loading.arguments import parse_arguments
from gradctl.subject.loading.closure import adopt_modules
from gradctl.subject.loading.factory import KnownInputs, build_model
from gradctl.subject.loading.library_operator import operator_function
from gradctl.subject.loading.target import find_in, find_target, import_target, on_import_path
from gradctl.subject.loading.weights import load_weights
from gradctl.subject.reach import walk
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.signature import (
    call_signature,
    function_class,
    is_subclass,
    module_of,
    optimized_inner,
    parameters_of,
)
from gradctl.subject.subject import OF_RANKS, Subject
from gradctl.subject.tree import leaves, map_leaves


def load_subject(options: TargetOptions, given: Inputs | None = None) -> Subject:
    """Return the model that the target names, with its inputs. Importing the target runs the user's code.

    The inputs are those ``given``; else ``input_specs`` take precedence over ``inputs_file``, and that over the
    functions beside the target. The random generators are seeded before the import, the factory and the inputs, and
    restored at the end.

    Raises:
        TargetError: GC101 to GC104 and GC106 to GC109, GC113, GC121, GC122, each with its page.
        TrustError: GC901 for a file that holds pickled code.
    """
    parsed = parse_target(options.target)
    values = parse_arguments(options.arguments)
    specs = [parse_input(text) for text in options.input_specs]
    device, provider = usable_device(options.device), usable_provider(options.provider)
    with on_import_path(parsed.root), preserve_generators():
        seed_generators(options.seed)
        module = import_target(parsed)
        name, found = find_target(parsed, module)
        loss = _loss(module, options.loss, parsed.place)
        beside = inputs_beside(module, name)
        seed_generators(options.seed)
        known = _at_hand(specs, options.inputs_file, beside) if given is None else KnownInputs(are_given=True)
        model = build_model(found, name, values, known)
        if options.weights is not None:
            load_weights(model, options.weights, options.target)
        notes = _set_mode(model, options.training)
        inputs = _inputs(model, specs, beside, options) if given is None else given
    if given is not None:
        _refuse_compiled(model, options.target)
    model = adopt_modules(model)
    _place(model, options.target, device)
    args, kwargs = map_leaves(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)
    is_given = bool(specs) or options.inputs_file is not None or given is not None
    source = None if is_given else beside
    return Subject(
        options.target,
        model,
        args,
        kwargs,
        function_class(model),
        loss,
        options.seed,
        notes,
        source,
        _of_ranks(module, name),
        provider,
    )


def make_subject(
    model: Callable[..., Any],
    inputs: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Subject:
    """Return a model that is there already, with its inputs; neither is changed.

    The arguments are those of ``gradctl.gradcheck``; modules that a function uses become part of the model.

    Raises:
        TargetError: GC109 not a model, or one without values; GC104 the inputs do not fit; GC113 invalid ``loss``.
    """
    model, name = _as_model(model)
    if loss is not None:
        ensure_loss(loss, "the loss")
    args, named = inputs_from_call(inputs, kwargs or {}, model)
    notes = training_notes(model, "call eval() first if this is not intended")
    module = inspect.getmodule(type(model) if isinstance(model, nn.Module) else model)
    beside = {} if module is None else _of_ranks(module, name)
    return Subject(name, model, args, named, function_class(model), loss, seed, notes, beside=beside)


def _of_ranks(module: ModuleType, target: str) -> dict[str, Any]:
    """Return what a file says about ranks: by ``NAME_parallelize`` of one target, or ``parallelize`` of all."""
    own = target.rpartition("::")[2].replace(".", "_")
    found = {name: getattr(module, f"{own}_{name}", getattr(module, name, None)) for name in OF_RANKS}
    return {name: value for name, value in found.items() if value is not None}


def make_candidate(model: Callable[..., Any], reference: Subject) -> Subject:
    """Return another model on the inputs of the reference, whether they fit it or not.

    Raises:
        TargetError: GC109 not a model, or one without values; GC123 if it has parts that torch.compile wraps.
    """
    _refuse_compiled(model, _name(model))
    model, name = _as_model(model)
    return Subject(name, model, reference.args, reference.kwargs, function_class(model), reference.loss, reference.seed)


def _refuse_compiled(model: Any, name: str) -> None:
    """Raise for a candidate that reaches what ``torch.compile`` wraps: a private copy runs without the wrapper."""
    if any(_is_compiled(found) for _, found in walk([((), model)])):
        raise TargetError(
            "GC123",
            f"{name} uses torch.compile, and the copy that is compared would run without it. Compare the form instead: "
            "gradctl compare TARGET --form compile.",
        )


def _is_compiled(found: Any) -> bool:
    by_method = isinstance(found, nn.Module) and vars(found).get("_compiled_call_impl") is not None
    return by_method or optimized_inner(found) is not found


def _as_model(model: Callable[..., Any]) -> tuple[Callable[..., Any], str]:
    """Return what is run of an object in Python, and what a report calls it."""
    if is_subclass(model, Function):
        model = model.apply  # type: ignore[attr-defined]
    model = operator_function(model) or model
    name = _name(model)
    if inspect.isclass(model):
        raise TargetError("GC109", f"the model is the class {name!r}. Give an object of it: {name}(…).")
    if not callable(model):
        raise TargetError(
            "GC109",
            f"the model is of type {type(model).__name__!r}. Give an nn.Module, a function of tensors, or an "
            "autograd.Function.",
        )
    model = adopt_modules(model)
    refuse_meta(model, name)
    return model, name


def device_of(subject: Subject) -> str:
    """Return the device of the model's first tensor, or of the first input."""
    given = [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    tensors = [*parameters_of(subject.model).values(), *given]
    return str(tensors[0].device) if tensors else "cpu"


def _name(model: Any) -> str:
    """Return what a report calls the model: the class of a module, the name of a function."""
    function = function_class(model)
    if function is not None:
        return function.__name__
    inner = optimized_inner(model)
    if isinstance(inner, nn.Module):
        return type(inner).__name__
    return str(getattr(model, "__name__", type(model).__name__))


def _at_hand(specs: Sequence[InputSpec], inputs_file: Path | None, beside: tuple[str, Any] | None) -> KnownInputs:
    """Return what tells a function of tensors from a factory; ``example_inputs`` may be for another target."""
    names = frozenset(spec.name for spec in specs if spec.name is not None)
    is_own = beside is not None and beside[0] != "example_inputs"
    return KnownInputs(names, are_given=bool(specs) or inputs_file is not None or is_own)


def _inputs(
    model: Callable[..., Any], specs: Sequence[InputSpec], beside: tuple[str, Any] | None, options: TargetOptions
) -> Inputs:
    """Return the inputs of the first source there is; none at all for a model that takes none."""
    if specs:
        return inputs_from_specs(specs, model, options.seed)
    if options.inputs_file is not None:
        return inputs_from_file(options.inputs_file, model)
    if beside is not None:
        seed_generators(options.seed)
        return inputs_from_beside(*beside, model)
    signature = call_signature(model)
    if signature is not None and not signature.parameters:
        return Inputs((), {})
    raise no_inputs(model, options)


def _set_mode(model: Callable[..., Any], training: bool | None) -> tuple[Finding, ...]:
    """Set the mode; if none is given, return GC105 if training mode changes what forward computes."""
    owner = module_of(model)
    if owner is not None and training is not None:
        owner.train(training)
        return ()
    return training_notes(model, "add --eval or --train to select the mode")


def training_notes(model: Callable[..., Any], remedy: str) -> tuple[Finding, ...]:
    """Return GC105 if modules are in training mode that compute otherwise there; ``remedy`` ends its message."""
    owner = module_of(model)
    active = Counter(kind for kind in map(_active_in_training, owner.modules() if owner is not None else ()) if kind)
    if not active:
        return ()
    counted = " and ".join(f"{count} {kind}" for kind, count in sorted(active.items()))
    are = "module is" if active.total() == 1 else "modules are"
    return (note("GC105", f"the model is in training mode: {counted} {are} active; {remedy}"),)


def _active_in_training(module: nn.Module) -> str | None:
    """Return the kind of a module that computes differently in training, and is in it; None of any other."""
    name, is_active = next((name, is_active) for kind, name, is_active in _TRAINED if isinstance(module, kind))
    return name if module.training and is_active(module) else None


def _drops(module: nn.Module) -> bool:
    """Return whether a module of another library drops something (DropPath, StochasticDepth), by its name."""
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "dropout_prob")]
    is_dropping = any(part in type(module).__name__.lower() for part in ("drop", "stochasticdepth"))
    return is_dropping and any(isinstance(rate, float) and rate > 0 for rate in rates)


# Of these classes the first that fits: the kind of a module, and whether training mode changes what it computes.
_TRAINED: tuple[tuple[Any, str, Callable[[Any], bool]], ...] = (
    (nn.modules.instancenorm._InstanceNorm, "InstanceNorm", lambda module: module.track_running_stats),
    (nn.modules.batchnorm._NormBase, "BatchNorm", lambda module: True),
    (nn.modules.dropout._DropoutNd, "Dropout", lambda module: module.p > 0),
    ((nn.RNNBase, nn.MultiheadAttention), "Dropout", lambda module: module.dropout > 0),
    (nn.Module, "Dropout", _drops),
)


def _loss(module: ModuleType, name: str | None, place: str) -> Callable[..., Any] | None:
    """Return the function that ``--loss`` names, beside the target."""
    if name is None:
        return None
    try:
        found = find_in(module, name, place, "GC113")
    except TargetError as error:
        raise TargetError("GC113", f"--loss {name!r}: {error.message}", details=error.details) from error
    ensure_loss(found, f"--loss {name!r}: {place}:{name}")
    return found  # type: ignore[no-any-return]


def ensure_loss(found: Any, name: str) -> None:
    """Raise unless a loss can be called with outputs.

    Raises:
        TargetError: GC113, a sentence that begins with ``name``.
    """
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__!r}"
        raise TargetError("GC113", f"{name} is {kind}, not a function of the outputs.")


def usable_device(device: str) -> torch.device:
    """Return the device, after placing a tensor on it."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        said = f"{device!r} is no device. Write cpu, cuda, mps or xpu; of several, with a number: cuda:1."
        raise TargetError("GC106", said) from error
    if where.type == "meta":
        raise TargetError("GC106", "the device 'meta' holds no values to check. Give --device cpu.")
    try:
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        if is_out_of_memory(error):
            raise
        said = f"device {device!r} cannot be used here ({first_line(error)})"
        raise TargetError("GC106", f"{said}. Give --device cpu, or see 'gradctl doctor'.") from error
    return where


def usable_provider(provider: str | None) -> str | None:
    """Return the execution provider, if onnxruntime has it; None stays None.

    Raises:
        TargetError: GC106 if it does not.
    """
    if provider is not None:
        import onnxruntime  # few targets name one

        if provider not in (known := onnxruntime.get_available_providers()):
            said = f"onnxruntime has no execution provider {provider!r} here"
            raise TargetError("GC106", f"{said}. It has {listed(known)}.")
    return provider


def _place(model: Callable[..., Any], target: str, device: torch.device) -> None:
    """Move the model to the device, in place, unless it is there."""
    refuse_meta(model, target)
    owner = module_of(model)
    # Quantised models of some libraries refuse .to(), even to where they are.
    if owner is not None and any(tensor.device != device for tensor in (*owner.parameters(), *owner.buffers())):
        owner.to(device)


def refuse_meta(model: Callable[..., Any], target: str) -> None:
    """Raise for a model without values.

    Raises:
        TargetError: GC109 if a parameter or buffer is on the device 'meta'.
    """
    owner = module_of(model)
    if owner is not None and any(tensor.is_meta for tensor in (*owner.parameters(), *owner.buffers())):
        said = f"{target} has parameters on the device 'meta', which hold no values. Make it on the CPU."
        raise TargetError("GC109", said)
