"""The gradients that a disabled hook really changes: those are not judged as training takes them."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.gradients.float64 import OracleRunner
from gradctl.gradients.part import gaussian
from gradctl.numerics.measures import relative_error
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of, optimized_inner
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.recorder import Recorder

# The two runs are the same but for the hooks, so what a hook leaves alone is equal to the last bit, or nearly.
_CHANGED = 1e-9


def leaves_behind_hooks(subject: Subject, source: OracleRunner) -> set[str]:
    """Return the names of the leaves that receive another gradient with hooks than without, from one cotangent.

    The leaves of ``source`` are not touched.
    """
    without, with_hooks = (_gradients(subject, source, keeps_hooks=keeps) for keeps in (False, True))
    return {name for name, gradient in without.items() if _differ(gradient, with_hooks[name])}


def _gradients(subject: Subject, source: OracleRunner, *, keeps_hooks: bool) -> dict[str, Tensor | None]:
    mode = source.runner.instance.input_mode
    instance = Instance(subject, promoted=source.is_promoted, input_mode=mode, keep_hooks=keeps_hooks)
    if keeps_hooks:
        _carry_later_hooks(subject, instance)
    runner = ModelRunner(instance, source.runner.promotion, FunctionWatch())
    with instance.preserve_leaves():
        outputs = [t for _, t in runner.run(Recorder(hooks_only=True, keeps_hooks=keeps_hooks)) if t.requires_grad]
        with runner.promoted():
            torch.autograd.backward(outputs, gaussian(outputs, subject.seed))
    return {leaf.name: leaf.take_gradient() for leaf in instance.leaves}


def _carry_later_hooks(subject: Subject, instance: Instance) -> None:
    """Give the copy those hooks after accumulation that can reach nothing of the user's: no optimizer, no model."""
    original, copied = module_of(optimized_inner(subject.model)), module_of(instance.model)
    parameters = dict(copied.named_parameters()) if copied is not None else {}
    for name, parameter in original.named_parameters() if original is not None else ():
        copy = parameters.get(name.replace("_orig_mod.", ""))
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            if copy is not None and _is_self_contained(hook):
                copy.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _is_self_contained(hook: Any) -> bool:
    if not isinstance(hook, types.FunctionType) or hook.__closure__ or hook.__defaults__ or hook.__kwdefaults__:
        return False
    used = [hook.__globals__.get(name) for name in hook.__code__.co_names]
    return not any(isinstance(value, nn.Module | Tensor | torch.optim.Optimizer) for value in used)


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return relative_error(one, other) > _CHANGED
