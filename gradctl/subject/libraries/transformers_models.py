"""Models of the ``transformers`` library: small ones made from a configuration class, and checkpoints in a folder.

Nothing is downloaded: a model type is built with small sizes and drawn weights, and a checkpoint is a local folder.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradctl.core.errors import GradctlError, TargetError, TrustError, is_out_of_memory, listed, nearest
from gradctl.core.library_targets import LibraryModel
from gradctl.core.target_files import ensure_plain
from gradctl.subject.frames import first_line
from gradctl.subject.libraries.model_inputs import ModelInputs, UnknownInput
from gradctl.subject.libraries.tiny_configuration import is_configuration, tiny_configuration
from gradctl.subject.tree import leaves

_MOST_PARAMETERS = 25_000_000  # 100 MB; of a model above it, a size was not made small
# The tasks whose class is the default, the first that a model type has; then the others, by name.
_FIRST_TASKS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CAUSAL_LM"),
    *("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "OBJECT_DETECTION"),
    *("SEMANTIC_SEGMENTATION", "CTC", "AUDIO_CLASSIFICATION"),
)
_MOST_CLASSES = 3  # of a type, that are tried in turn
_WITHOUT_HEAD = {"BACKBONE", "TEXT_ENCODING", "IMAGE"}
_MAPPING = re.compile(r"MODEL_FOR_(\w+)_MAPPING_NAMES")


class _Unfit(Exception):
    """A model that could be built, and is of no use: too large, or without a gradient."""


_Result = TypeVar("_Result")
Built = tuple[nn.Module, dict[str, Any]]


def tiny_model(named: LibraryModel, settings: Mapping[str, Any]) -> Built:
    """Return a small model of a type in evaluation mode, and inputs by name; ``settings`` are of its configuration.

    Raises:
        TargetError: GC125 if the type has no such class or attention implementation, or if the library cannot build or
            run it with small sizes; GC108 if the configuration has no such field.
    """
    library = _library()
    kind = library.CONFIG_MAPPING[named.name]
    fields = [each.name for each in dataclasses.fields(kind)]
    for name in settings:
        if name not in fields:
            raise TargetError("GC108", f"{kind.__name__} has no field {name!r}{nearest(name, fields)}.")
    classes = _classes(named, library)

    def attempt(model_class: Any, keep_lists: bool) -> Built:
        configuration = _of_class(tiny_configuration(kind, settings, keep_lists=keep_lists), model_class)
        _refuse_large(model_class, configuration)
        model = model_class._from_config(configuration, **_options(named, model_class))
        _draw_weights(model)
        return model.eval(), runnable_inputs(model)

    try:
        return _first_success(*(partial(attempt, each, keep) for each in classes for keep in (False, True)))
    except Exception as error:  # of the library, on sizes of this program
        if isinstance(error, GradctlError) or is_out_of_memory(error):
            raise
        said = f"{classes[0].__name__} of hf:{named.name} cannot be built or run with small sizes"
        raise TargetError("GC125", f"{said} ({_reason(error)}). Write a factory for it: FILE.py:NAME.") from error


def runnable_inputs(model: Any) -> dict[str, Any]:
    """Return the first inputs that the model takes and whose outputs have a gradient.

    Raises:
        Exception: what the model raises on the first ones.
    """
    inputs = ModelInputs(model, torch.initial_seed()).candidates()
    return _first_success(*(partial(_run, model, each) for each in inputs))


def heads(model_type: str) -> list[str]:
    """Return the names of the classes with a head of a model type, the default one first."""
    from transformers.models.auto import modeling_auto

    tasks = {match[1]: vars(modeling_auto)[match[0]] for match in map(_MAPPING.fullmatch, vars(modeling_auto)) if match}
    names: list[str] = []
    for task in dict.fromkeys((*_FIRST_TASKS, *sorted(tasks.keys() - _WITHOUT_HEAD))):
        found = tasks.get(task, {}).get(model_type, ())
        names += [found] if isinstance(found, str) else found
    return list(dict.fromkeys(names))


def _library() -> Any:
    """Return the library, which then looks for nothing in the network, and warns of nothing.

    Its warnings are of kernels that are not installed, and of sizes that are not usual.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at the import
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    return library


def _classes(named: LibraryModel, library: Any) -> list[Any]:
    """Return the class that is named, or the first ones of the model type, of which the default one may not run."""
    known = heads(named.name)
    most = _MOST_CLASSES if named.attention is None else 1  # or two implementations could have two classes
    names = known[:most] if named.head is None else [named.head]
    if not names:
        said = f"transformers has no class with a head for 'hf:{named.name}'"
        raise TargetError("GC125", f"{said}. Name one: hf:{named.name}:CLASS.")
    found = [getattr(library, name, None) for name in names]
    if not all(inspect.isclass(each) and issubclass(each, library.PreTrainedModel) for each in found):
        said = f"transformers has no model class {names[0]!r}{nearest(names[0], known)}"
        raise TargetError("GC125", f"{said}. For hf:{named.name}: {listed(known)}.")
    return found


def _of_class(configuration: Any, model_class: Any) -> Any:
    """Return the configuration that a class takes: the whole one, or the one in it of the class's own kind (of text).

    A class of another model type, which several share (``LlamaForCausalLM``), takes the whole one.
    """
    kind = model_class.config_class or object
    inner = [configuration, *(each for each in vars(configuration).values() if is_configuration(each))]
    return next((each for each in inner if isinstance(each, kind)), configuration)


def _options(named: LibraryModel, model_class: Any) -> dict[str, Any]:
    """Return how attention and experts are computed."""
    options: dict[str, Any] = {}
    if named.attention is not None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
        if named.attention not in known:
            near = nearest(named.attention, known)
            said = f"transformers has no attention implementation {named.attention!r}{near}"
            raise TargetError("GC125", f"{said}. It has {', '.join(known)}.")
        options["attn_implementation"] = named.attention
    if model_class._can_set_experts_implementation():
        options["experts_implementation"] = "batched_mm"  # the other ones have no float64, or choose rows by value
    return options


def _refuse_large(model_class: Any, configuration: Any) -> None:
    """Raise for a model that is not small, before its memory is allocated."""
    with torch.device("meta"):
        try:
            model = model_class._from_config(copy.deepcopy(configuration))
        except Exception:  # a constructor that computes with values; or one that fails, as it will without 'meta'
            return
    count = sum(each.numel() for each in model.parameters())
    if count > _MOST_PARAMETERS:
        raise _Unfit(f"{count:.1e} parameters are left")


def _draw_weights(model: nn.Module) -> None:
    """Draw the weights so that every layer changes what the next one reads.

    The library draws most with a deviation of 0.02, beside which the residual stream of a small model is constant.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.numel() > 0 and parameter.is_floating_point():
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def _run(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs, to which ``use_cache=False`` is added where a cache is among the outputs.

    Raises:
        Exception: the model does not take them, or has no gradient.
    """
    copied = copy.deepcopy(model)  # some keep what they computed for the next call
    outputs = list(leaves(copied(**inputs)))
    has_cache = any("cache" in name or not isinstance(each, Tensor) for name, each in outputs)
    takes = inspect.signature(model.forward).parameters
    if has_cache and "use_cache" in takes and "use_cache" not in inputs:
        return _run(model, {**inputs, "use_cache": False})
    _run_backward(copied, [each for _, each in outputs if isinstance(each, Tensor) and each.requires_grad])
    return inputs


def _run_backward(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Raise unless a backward runs from the outputs."""
    if not outputs:
        raise _Unfit("no output has a gradient")
    total = torch.stack([each.abs().sum() for each in outputs]).sum()
    torch.autograd.grad(total, [each for each in model.parameters() if each.requires_grad], allow_unused=True)


def _first_success(*attempts: Callable[[], _Result]) -> _Result:
    """Return what the first attempt returns that raises nothing; if all raise, what the first one raised."""
    first: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except Exception as error:
            if isinstance(error, GradctlError) or is_out_of_memory(error):
                raise
            first = first or error
    raise first or _Unfit("it takes no inputs that gradctl knows")


def _reason(error: BaseException) -> str:
    """Return why the library refused: a package that is missing, or the first line of what it says."""
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the package {error.name}"
    if missing := re.search(r"requires the (\S+) library", str(error)):
        return f"it needs the package {missing[1]}"
    if "Validation" in type(error).__name__ and error.__cause__ is not None:
        return _reason(error.__cause__)  # its own first line names a validator
    return str(error) if isinstance(error, _Unfit | UnknownInput) else first_line(error).rstrip(".")


def checkpoint(named: LibraryModel, settings: Mapping[str, Any]) -> Built:
    """Return the model of a checkpoint in a folder, in evaluation mode, and inputs by name.

    Raises:
        TargetError: GC125 if the folder is no checkpoint of this library; GC121 if weights are missing in it; GC108 for
            settings.
        TrustError: GC901 if code or pickled weights in it would have to run.
    """
    library, folder = _library(), named.folder
    assert folder is not None
    if settings:
        raise TargetError("GC108", f"{folder} has a configuration of its own. Leave out --arg {min(settings)}.")
    content = _configuration_file(folder)
    model_type = _known_type(content, folder, library)
    _ensure_weights(folder)
    saved = content.get("architectures")
    default = str(saved[0]) if isinstance(saved, list) and saved else None
    model_class = _classes(dataclasses.replace(named, name=model_type, head=named.head or default), library)[0]
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        configuration = library.AutoConfig.from_pretrained(folder, use_cache=False, **local)
        model, loaded = model_class.from_pretrained(
            folder,
            config=_of_class(configuration, model_class),
            use_safetensors=True,
            output_loading_info=True,
            **local,
            **_options(named, model_class),
        )
        if missing := sorted(loaded["missing_keys"]):
            said = f"{folder} has no weights for {listed(missing)} of {model_class.__name__}"
            raise TargetError("GC121", f"{said}. Name the class that was saved: hf:FOLDER:CLASS.")
        return model.eval(), runnable_inputs(model)
    except Exception as error:  # of the library, on the user's files
        if isinstance(error, GradctlError) or is_out_of_memory(error):
            raise
        said = f"{folder} cannot be loaded as {model_class.__name__} and run ({_reason(error)})"
        raise TargetError("GC125", f"{said}. Load it in a factory: FILE.py:NAME.") from error


def _known_type(content: Mapping[str, Any], folder: Path, library: Any) -> str:
    """Return the model type of a configuration, for which the library itself has the code."""
    model_type = str(content.get("model_type"))
    if model_type in library.CONFIG_MAPPING:
        return model_type
    if "auto_map" in content:
        said = f"{folder} has a model in code of its own ({model_type!r}), which runs when it is loaded"
        raise TrustError("GC901", f"{said}. If you trust its author, load it in a factory: FILE.py:NAME.")
    near = nearest(model_type, library.CONFIG_MAPPING.keys())
    raise TargetError("GC125", f"{folder}/config.json has the unknown model_type {model_type!r}{near}.")


def _ensure_weights(folder: Path) -> None:
    """Raise unless there are weights that are no pickles."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        said = f"{folder} has pickled weights only (*.bin), which can run code when loaded"
        raise TrustError("GC901", f"{said}. Save them with save_pretrained(folder, safe_serialization=True).")
    raise TargetError("GC125", f"{folder} has no weights: no *.safetensors file is in it.")


def _configuration_file(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    file = folder / "config.json"
    ensure_plain(file, "GC125", "*.json")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise TargetError("GC125", f"{file} is not JSON ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise TargetError("GC125", f"{file} holds no configuration: its JSON is not an object.")
    return content
