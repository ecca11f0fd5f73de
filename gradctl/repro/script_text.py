"""The text of a ``repro.py`` and the folder that it runs from: its tensors beside it, and the user's own files."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from gradctl.repro import parts as repro_parts

SCRIPT, TENSORS, SOURCE = "repro.py", "tensors.safetensors", "source"

# All functions that a script may contain, in the order of their definition.
_FUNCTIONS = {name: each for name, each in vars(repro_parts).items() if inspect.isfunction(each)}
# The modules that these functions use; a script imports only those that it needs.
_ALWAYS = ("importlib", "sys", "traceback")
_IMPORTS = ("copy", "dataclasses", "importlib", "random", "sys", "tempfile", "traceback")


class Unwritable(Exception):
    """A script cannot contain an input of this type; the message names it."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The common part of all candidates for one finding.

    Attributes:
        form: which form is captured; ``eager`` for a finding about eager itself.
        quantity: ``output``, ``gradient``, ``buffer``, ``raises``; or ``nan output``, ``nan
            gradient`` for values that are not finite.
        tolerance: relative; above it the bug is there.
        module: the import name of the target.
        build: the expression that makes the model, of ``source``, the imported module.
        training: the mode to set; None leaves it.
        loss: the expression of the loss, of ``source``; empty for none.
        loss_takes_inputs: whether it wants the inputs too.
        seed, threads, device: as in the run that found it.
        report: the docstring.
        start: paths of submodules to try first.
        only_plain: whether a candidate must be free of cuts, hooks and accepted Functions, which finite differences
            in a plain script do not hold fixed.
        allows: accepted findings.
    """

    form: str
    quantity: str
    tolerance: float
    module: str
    build: str
    training: bool | None = None
    loss: str = ""
    loss_takes_inputs: bool = False
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    report: str = ""
    start: tuple[str, ...] = ()
    only_plain: bool = False
    allows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to show the bug.

    Attributes:
        example: positional and keyword inputs on which a form is captured.
        inputs: the inputs to run on.
        submodule: path of the part that is run; empty for the whole model.
        calls: how many in a row.
        state: its parameters and buffers, by name.
    """

    example: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    submodule: str = ""
    calls: int = 1
    state: Mapping[str, Tensor] = field(default_factory=dict)


def write(recipe: Recipe, candidate: Candidate, folder: Path, sources: Path) -> None:
    """Write script, tensors and sources into a new folder.

    Args:
        recipe: of the check.
        candidate: to check.
        folder: must not exist yet.
        sources: the folder of the user's files, to be copied.

    Raises:
        Unwritable: an input is no tensor, number, text or plain container of these.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in candidate.state.items()}
    inputs = _written(candidate.inputs, "inputs", tensors)
    is_one = candidate.example is candidate.inputs
    example = "INPUTS" if is_one else _written(candidate.example, "example", tensors)
    folder.mkdir()
    shutil.copytree(sources, folder / SOURCE)
    # safetensors refuses tensors that share memory, or have gaps.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / TENSORS)
    (folder / SCRIPT).write_text(_text(recipe, candidate, example, inputs), encoding="utf-8")


def _written(value: Any, path: str, tensors: dict[str, Tensor]) -> str:
    """Return ``value`` as an expression of ``TENSORS``, to which its tensors are added."""
    if isinstance(value, Tensor):
        return _tensor(value, path, tensors)
    if type(value) is dict:
        items = [f"{key!r}: {_written(child, f'{path}.{key}', tensors)}" for key, child in value.items()]
        return f"{{{', '.join(items)}}}"
    if type(value) in (tuple, list, torch.Size):
        children = [_written(child, f"{path}.{index}", tensors) for index, child in enumerate(value)]
        if type(value) is list:
            return f"[{', '.join(children)}]"
        return f"({', '.join(children)},)" if children else "()"
    return _constant(value, path)


def _tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unwritable(f"{path} is a tensor of layout {tensor.layout}")
    tensors[path] = tensor
    text = f"TENSORS[{path!r}]"
    return text if tensor.is_contiguous() else f"strided({text}, {tuple(tensor.stride())})"


def _constant(value: Any, path: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if value is not None and type(value) not in (bool, int, float, complex, str, torch.dtype):
        raise Unwritable(f"{path} is of type {type(value).__name__!r}")
    return repr(value)


def _check(recipe: Recipe) -> str:
    """Return the call that checks."""
    if recipe.quantity.startswith("nan "):
        return f"look_for_nan(make_model, finish, inputs=INPUTS, seed=SEED, quantity={recipe.quantity[4:]!r})"
    if recipe.form == "eager":
        return "compare_with_finite_differences(make_model, finish, inputs=INPUTS, seed=SEED, tolerance=TOLERANCE)"
    return (
        f"compare_with_form(\n        make_model, capture_{recipe.form}, finish, example=EXAMPLE, inputs=INPUTS, "
        f"calls=CALLS, seed=SEED,\n        quantity={recipe.quantity!r}, tolerance=TOLERANCE,\n    )"
    )


def _model_lines(recipe: Recipe, candidate: Candidate) -> Iterator[str]:
    """Yield the statements that make the model, part or whole, in its mode, on its device, with its state."""
    yield f"model = {recipe.build}"
    if recipe.training is not None:
        yield f"model.train({recipe.training})"
    if candidate.submodule:
        yield f"model = model.get_submodule({candidate.submodule!r})"
    if candidate.state:
        if recipe.device != "cpu":
            yield f"model.to({recipe.device!r})"
        yield "with torch.no_grad():"
        yield "    for name, tensor in (*model.named_parameters(), *model.named_buffers()):"
        yield '        tensor.copy_(TENSORS[f"model.{name}"])'


def _text(recipe: Recipe, candidate: Candidate, example: str, inputs: str) -> str:
    check = _check(recipe)
    model = "\n    ".join(_model_lines(recipe, candidate))
    device = "" if recipe.device == "cpu" else f".to({recipe.device!r})"
    finish = "call"
    if recipe.loss and not candidate.submodule:
        loss = f"importlib.import_module({recipe.module!r}).{recipe.loss}"
        finish = f"with_loss(call, {loss}, {recipe.loss_takes_inputs})"
    needed = "numpy, safetensors, onnxruntime" if recipe.form == "onnx" else "numpy, safetensors"
    functions = "\n\n\n".join(_sources(f"{finish} {check} {example} {inputs} seed_everything()"))
    captured_on = "" if recipe.form == "eager" else f"CALLS = {candidate.calls}\nEXAMPLE = {example}\n"
    tolerance = "" if recipe.quantity.startswith("nan ") else f"TOLERANCE = {recipe.tolerance:.3e}\n"
    imports = "\n".join(f"import {name}" for name in _IMPORTS if name in _ALWAYS or f"{name}." in functions)
    return f'''"""{_in_docstring(recipe.report)}
"""

from __future__ import annotations

{imports}
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    import torch
    import numpy as np
    from safetensors.torch import load_file
except ImportError as error:
    print(f"this needs torch, {needed}: {{error}}", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / {SOURCE!r}))
torch.set_num_threads({recipe.threads})

SEED = {recipe.seed}
{tolerance}TENSORS = {{name: tensor{device} for name, tensor in load_file(HERE / {TENSORS!r}).items()}}
INPUTS = {inputs}
{captured_on}

def make_model() -> Any:
    """Return the model as it was when the bug was found."""
    seed_everything(SEED)
    source = importlib.import_module({recipe.module!r})
    seed_everything(SEED)
    {model}
    return model


def finish(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call, followed by the loss if there is one."""
    return {finish}


{functions}


def main() -> int:
    """Return 1 while the bug is there, and 0 once it is gone."""
    code = {check}
    print("the bug is there" if code else "the bug is gone")
    return code


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:
        traceback.print_exc()
        print("this could not be run, so it says nothing of the bug", file=sys.stderr)
        exit_code = 2
    sys.exit(exit_code)
'''


def _sources(text: str) -> list[str]:
    """Return the source of the functions that ``text`` uses, and of those that these use."""
    sources = {name: inspect.getsource(each).rstrip() for name, each in _FUNCTIONS.items()}
    used: set[str] = set()
    while found := {name for name in sources.keys() - used if re.search(rf"\b{name}[(,]", text)}:
        used |= found
        text = "\n".join(sources[name] for name in found)
    return [source for name, source in sources.items() if name in used]


def _in_docstring(text: str) -> str:
    """Return text that may stand between triple quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\\n", "\n").replace('\\"', '"').replace('"""', "'''")
