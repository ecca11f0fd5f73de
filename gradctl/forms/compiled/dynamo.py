"""Compilation by Dynamo with a backend, for ``aot`` and ``compile``; ensures that a compiled frame ran."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from gradctl.forms.eager import wrap_module
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.subject.instance import Instance
from gradctl.subject.torch_private import dynamo_counters, reset_dynamo


def compile_with(form: str, instance: Instance, backend: str, options: dict[str, Any]) -> Captured:
    """Return the model compiled by this backend, forward and backward, on its own inputs.

    Raises:
        CannotCapture: compilation fails, or no frame was compiled (Dynamo falls back to eager silently).
    """
    reset_dynamo()
    start = perf_counter()
    try:
        compiled: Callable[..., Any] = torch.compile(instance.model, backend=backend, **options)
        instance.restore()
        args, kwargs = instance.inputs()
        frames = _compiled_frames()
        with silenced():
            outputs = [t for _, t in instance.call(compiled, args, kwargs) if t.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])
        for leaf in instance.leaves:
            leaf.take_gradient()
    except Exception as error:  # the compiler or the user's model may raise anything
        raise CannotCapture(f"torch.compile fails: {reason_of(error)}", traceback.format_exc()) from error
    if _compiled_frames() == frames:
        raise CannotCapture("torch.compile compiled no frame of this model and would run it eagerly.")
    instance.restore()
    return wrap_module(form, instance, compiled, seconds=perf_counter() - start)


def _compiled_frames() -> int:
    return int(dynamo_counters["frames"]["ok"])
