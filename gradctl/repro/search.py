"""The search for the smallest program that still fails, in a process of its own.

``main`` reads a folder: ``recipe.json``, ``sources``, and ``whole``, a script of the whole model on its example. Each
candidate is written as a script of its own, and run as one; the names of those that fail go to ``failing.txt``, each
smaller than the one before. A search that crashes or runs out of time has found what stands there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from gradctl.core.allows import Allows
from gradctl.core.errors import GradctlError
from gradctl.diagnosis.localise_modules import called_children
from gradctl.gradients.gradcheck import gradcheck
from gradctl.repro.parts import buffers_of, fresh, parameters_of, seed_everything, tensors_in
from gradctl.repro.script_text import SCRIPT, Candidate, Recipe, Unwritable, write
from gradctl.subject.inputs.variations import VARIATIONS
from gradctl.subject.subject import Subject
from gradctl.subject.tree import map_leaves

FAILING, RECIPE, SOURCES, WHOLE = "failing.txt", "recipe.json", "sources", "whole"
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_CALLS = 3  # as ``compare`` makes: TorchScript's own autodiff starts late, state accumulates


def main() -> None:
    """Search in the folder and for the seconds that the command line names."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    warnings.simplefilter("ignore")
    _Search(folder, time.monotonic() + seconds).run()
    # Threads and exit handlers of the user's, and of compilers, can hang; the results are written already.
    os._exit(0)


class _Search:
    """One search, best first: a bug on the example, in the smallest part, with the smallest batch."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline, self.count = folder, deadline, 0
        self.recipe = msgspec.json.decode((folder / RECIPE).read_bytes(), type=Recipe)
        whole = runpy.run_path(str(folder / WHOLE / SCRIPT), run_name="whole")
        self.make_model = whole["make_model"]
        model, inputs = self.make_model(), whole["INPUTS"]
        self.whole = Candidate(inputs, inputs, state=state_of(model))
        self.modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}

    def run(self) -> None:
        """Write down every candidate that fails."""
        best = next((each for each in self._variations() if self._fails(each)), None)
        if best is None:
            # A part alone may fail although the whole does not, because of its cuts and accepted Functions.
            best = self._smaller_part(self.whole)
            if best is None:
                return
        while (part := self._smaller_part(best)) is not None:
            best = part
        while (fewer := next((each for each in _halves(best) if self._fails(each)), None)) is not None:
            best = fewer

    def _variations(self) -> Iterator[Candidate]:
        """Yield the whole model on the inputs, and as often, as the finding may depend on."""
        is_eager = self.recipe.form == "eager"
        for name, vary in VARIATIONS.items():
            inputs = self.whole.inputs if name == "example" else _mapped(self.whole.inputs, vary)
            for calls in (1,) if is_eager else (1, _CALLS):
                yield replace(self.whole, inputs=inputs, calls=calls)
            if is_eager:
                return

    def _smaller_part(self, candidate: Candidate) -> Candidate | None:
        """Return a part of the candidate that fails alone on what it is called with there."""
        path = candidate.submodule
        names = self._names_of_parts(path)
        example = self._recorded(path, names, candidate.example)
        inputs = example if candidate.inputs is candidate.example else self._recorded(path, names, candidate.inputs)
        for name in names:
            if name in example and name in inputs:
                state = state_of(self.modules[name])
                part = replace(candidate, example=example[name], inputs=inputs[name], submodule=name, state=state)
                if self._fails(part):
                    return part
        return None

    def _names_of_parts(self, path: str) -> list[str]:
        """Return the parts of a module to try: those that the recipe starts with, then its children."""
        if path not in self.modules:
            return []
        prefix = f"{path}." if path else ""
        likely = [name for name in self.recipe.start if name.startswith(prefix) and name in self.modules]
        return list(dict.fromkeys([*likely, *called_children(self.modules[""], path)]))

    def _recorded(self, path: str, names: list[str], inputs: _Inputs) -> dict[str, _Inputs]:
        """Return the inputs of the first call of each of these parts, if the part at ``path`` runs on ``inputs``."""
        model = self.make_model()
        found: dict[str, _Inputs] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, _mapped((args, kwargs), lambda tensor: tensor.detach().clone()))

        for name in names:
            model.get_submodule(name).register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        args, kwargs = fresh(inputs)
        seed_everything(self.recipe.seed)
        with contextlib.suppress(Exception):  # the parts that were called before it raised are known
            (model.get_submodule(path) if path else model)(*args, **kwargs)
        return found

    def _fails(self, candidate: Candidate) -> bool:
        """Return whether the candidate's own script returns 1; then write its name down."""
        if time.monotonic() > self.deadline:
            return False
        self.count += 1
        place = self.folder / str(self.count)
        try:
            write(self.recipe, candidate, place, self.folder / SOURCES)
            torch.compiler.reset()
            code = runpy.run_path(str(place / SCRIPT), run_name="candidate")["main"]()
        except Unwritable as error:
            print(error)
            return False
        except (Exception, SystemExit):  # the user's code or a compiler may raise anything
            traceback.print_exc()
            return False
        if code != 1 or (self.recipe.only_plain and not self._is_plain(candidate)):
            return False
        with (self.folder / FAILING).open("a", encoding="utf-8") as file:
            file.write(f"{place.name}\n")
        return True

    def _is_plain(self, candidate: Candidate) -> bool:
        """Return whether gradcheck of the candidate detaches nothing, disables no hook and accepts nothing."""
        model = self.make_model()
        part = model.get_submodule(candidate.submodule) if candidate.submodule else model
        try:
            unit = gradcheck(Subject(candidate.submodule, part, *candidate.inputs, seed=self.recipe.seed))
        except GradctlError:
            return False
        accepted = Allows(self.recipe.allows)
        is_accepted = any(accepted.matching(finding.allow) for finding in unit.findings)
        is_hooked = any(finding.code == "GC409" for finding in unit.findings)
        return not is_accepted and not is_hooked and (unit.oracle is None or not unit.oracle.held_fixed)


def state_of(model: Any) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a function has none."""
    return {**parameters_of(model), **buffers_of(model)}


def _mapped(inputs: _Inputs, function: Callable[[Tensor], Tensor]) -> _Inputs:
    args, kwargs = map_leaves(lambda _, leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return args, kwargs


def _halves(candidate: Candidate) -> Iterator[Candidate]:
    """Yield the candidate with each half of its batch: axis 0 of all inputs that have the size of the first one's."""
    sizes = [tensor.shape[0] for tensor in tensors_in(candidate.inputs) if tensor.ndim]
    if not sizes or sizes[0] < 2:
        return
    size, half = sizes[0], (sizes[0] + 1) // 2
    for part in (slice(0, half), slice(size - half, size)):

        def cut(tensor: Tensor, part: slice = part) -> Tensor:
            return tensor[part] if tensor.ndim and tensor.shape[0] == size else tensor

        inputs = _mapped(candidate.inputs, cut)
        is_one = candidate.example is candidate.inputs
        yield replace(candidate, inputs=inputs, example=inputs if is_one else _mapped(candidate.example, cut))
