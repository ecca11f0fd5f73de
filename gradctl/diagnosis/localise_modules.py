"""The module whose form differs: each module is captured alone, on the inputs that it has in eager.

Descends from the model into the child that still differs alone; the innermost such module is the place. One level of
the tree is recorded at a time, so memory is that of the inputs of a module's children.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.comparison.compare import Comparison, tensors_of
from gradctl.comparison.difference import ModelDifference
from gradctl.comparison.program import FormProgram, run_calls
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding
from gradctl.core.names import Quantity
from gradctl.forms import eager
from gradctl.forms.form import CannotCapture, Captured, Form
from gradctl.forms.source_location import SourceLocation
from gradctl.numerics.agreement import largest_scale, scale_of
from gradctl.subject.frames import is_users, user_location
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.state import State
from gradctl.subject.subject import Subject
from gradctl.subject.tree import map_leaves

# Of a module that is called in a loop, the first calls are compared.
_CALLS_A_MODULE = 3
# A module explains a difference if its own difference is at least a hundredth of it.
_EXPLAINS = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """The arguments of one call of a module, and its place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: tuple[str, int] | None


@dataclass(slots=True, eq=False)
class AloneModules:
    """The modules of a model, each as a model of its own.

    Attributes:
        reference: of the whole model.
        capture: makes a form of the module of a path, from its private copy.
        trial: the inputs on which the form differs; it is captured on the example's.
        finding: of the tensor that differs.
        difference: of that tensor.
        deadline: on the clock of ``time.perf_counter``: later no further module is captured.
    """

    reference: Reference
    capture: Callable[[str, Instance], Captured]
    trial: ModelTrial
    finding: Finding
    difference: ModelDifference
    deadline: float = math.inf

    def innermost(self) -> SourceLocation | None:
        """Return the innermost module that differs alone; None if the model itself does not when captured again."""
        model = module_of(self.reference.subject.model)
        if model is None or not self._differs("", _whole(self.reference.trials[0]), [_whole(self.trial)]):
            return None
        path, place = "", _own_line(model)
        while time.perf_counter() < self.deadline:
            found = self._differing_child(model, path)
            if found is None:
                break
            path, line = found
            place = _own_line(model.get_submodule(path)) or line
        kind = type(model.get_submodule(path)).__name__
        return SourceLocation(path, kind, *(place or (None, None)))

    def _differing_child(self, model: nn.Module, path: str) -> tuple[str, tuple[str, int] | None] | None:
        """Return the child that differs alone and is called last, and the line that calls it."""
        paths = list(called_children(model, path))
        captured_on = self._calls(self.reference.trials[0], paths)
        run_on = captured_on if self.trial is self.reference.trials[0] else self._calls(self.trial, paths)
        for child in reversed([name for name in run_on if name in captured_on]):
            if time.perf_counter() > self.deadline:
                return None
            if self._differs(child, captured_on[child][0], run_on[child]):
                return child, run_on[child][0].place
        return None

    def _calls(self, trial: ModelTrial, paths: list[str]) -> dict[str, list[_Call]]:
        """Return the calls of these modules by eager on a trial, in the order of their first calls."""
        instance = Instance(trial.instance.subject, input_mode=self.reference.input_mode, keep_hooks=True)
        module = module_of(instance.model)
        assert module is not None
        calls: dict[str, list[_Call]] = {}
        with torch.enable_grad():
            instance.run(_noting({path: module.get_submodule(path) for path in paths}, calls))
        return calls

    def _differs(self, path: str, captured_on: _Call, run_on: list[_Call]) -> bool:
        """Return whether the form of one module differs from the module on some of these calls."""
        try:
            captured = self.capture(path, self._instance(path, captured_on))
            return any(self._differs_on(captured, self._instance(path, call)) for call in run_on)
        except CannotCapture:
            return False
        except Exception as error:  # the module may raise anything when it is called alone
            if is_out_of_memory(error):
                raise
            return False

    def _differs_on(self, captured: Captured, instance: Instance) -> bool:
        own = Instance(instance.subject, input_mode="clone", keep_hooks=True)
        eager_calls = run_calls(eager.capture(own), own, State([]), calls=self.difference.call)
        if eager_calls[-1].error is not None:
            return False
        comparison: Comparison[ModelTrial] = Comparison(FormProgram(captured))
        comparison.add([ModelTrial("alone", eager_calls, eager_calls, instance=instance, float64=None)])
        asked = ("buffer",) if self.finding.quantity == "buffer" else ("output", "gradient")
        return bool(comparison.raised) or any(
            self._explains(quantity, each) for (quantity, _), each in comparison.worst.items() if quantity in asked
        )

    def _explains(self, quantity: Quantity, each: ModelDifference) -> bool:
        """Return whether a difference of a module alone can be the reason for that of the model."""
        if each.is_missing:
            neighbours = largest_scale(tensors_of(each.trial.native[each.call - 1], quantity).values())
            only = each.reference if each.reference is not None else each.candidate
            return only is not None and scale_of(only) > _EXPLAINS * neighbours
        size = self.difference.error if math.isfinite(self.difference.error) else 1.0
        return bool(each.structure) or each.error > max(each.budget, _EXPLAINS * size)

    def _instance(self, path: str, call: _Call) -> Instance:
        """Return a private copy of one module on the inputs of a call."""
        subject = self.reference.subject
        whole = module_of(subject.model)
        assert whole is not None
        if not path:
            own = replace(subject, args=call.args, kwargs=call.kwargs)
            return Instance(own, input_mode=self.reference.input_mode, keep_hooks=True)
        module = whole.get_submodule(path)
        own = Subject(target=f"{subject.target} {path}", model=module, args=call.args, kwargs=call.kwargs)
        return Instance(replace(own, seed=subject.seed, provider=subject.provider), input_mode="clone", keep_hooks=True)


def capture_with(form: Form) -> Callable[[str, Instance], Captured]:
    """Return the function by which a form captures a module alone, wherever it is in the model."""
    return lambda _, instance: form.capture(instance)


@contextmanager
def _noting(modules: Mapping[str, nn.Module], calls: dict[str, list[_Call]]) -> Iterator[None]:
    """Note the arguments of each module; entered for one run, before which the instance restores all hooks."""

    def note(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        known = calls.setdefault(path, [])
        if len(known) < _CALLS_A_MODULE:
            args, kwargs = map_leaves(lambda _, leaf: _copied(leaf), (args, kwargs))
            known.append(_Call(args, kwargs, user_location()))

    with ExitStack() as stack:
        for path, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):  # accepts no hook, and is compiled already
                hook = module.register_forward_pre_hook(partial(note, path), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _whole(trial: ModelTrial) -> _Call:
    subject = trial.instance.subject
    return _Call(subject.args, subject.kwargs, None)


def called_children(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of a module's children; of those that are never called (``ModuleList``), their own children."""
    for name, child in model.get_submodule(path).named_children():
        inner = f"{path}.{name}" if path else name
        has_forward = getattr(type(child), "forward", None) is not nn.Module.forward
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or not has_forward:
            yield from called_children(model, inner)
        else:
            yield inner


def _own_line(module: nn.Module) -> tuple[str, int] | None:
    """Return file and line of the forward of a module; None if it belongs to torch."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code is not None and is_users(code.co_filename) else None


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
