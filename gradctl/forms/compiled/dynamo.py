"""What ``aot`` and ``compile`` share: Dynamo, a backend, and proof that a compiled frame really ran."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from gradctl.forms.eager import of_module
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.subject.instance import Instance
from gradctl.subject.torch_private import dynamo_counters, reset_dynamo

__all__ = ["compiled_with"]


def compiled_with(form: str, instance: Instance, backend: str, options: dict[str, Any]) -> Captured:
    """Return the model compiled by this backend, forward and backward, on its own inputs.

    Raises:
        CannotCapture: compiling fails, or no frame was compiled (Dynamo falls back to eager without a word).
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
    return of_module(form, instance, compiled, seconds=perf_counter() - start)


def _compiled_frames() -> int:
    return int(dynamo_counters["frames"]["ok"])
