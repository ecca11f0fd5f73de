"""A runner whose gradient is a form's and whose finite differences are eager's: ``gradctl gradcheck --form``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from gradctl.core.errors import TargetError
from gradctl.core.names import RANK_FORMS, WITHOUT_GRADIENTS
from gradctl.forms.form import CannotCapture, Captured, gradient_tensors, to_float64
from gradctl.forms.table import form_named
from gradctl.numerics.runner import Outputs
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.recorder import Recorder


class FormRunner(ModelRunner):
    """Eager in float64, except that ``differentiate`` runs the form, on the same values of the leaves."""

    def __init__(self, eager: ModelRunner, captured: Captured) -> None:
        super().__init__(eager.instance, eager.promotion, eager.watch)
        self.captured = captured
        self.leaves = [replace(leaf, sharing=gradient_tensors(leaf, captured)) for leaf in eager.leaves]
        # Dynamo runs eagerly under a dispatch mode: compiled code is called, and differentiated, without it.
        # Ranks enter it themselves.
        self._plain, self._is_eager = captured.form in ("aot", "compile", *RANK_FORMS), False

    def differentiate(self) -> Outputs:
        """Return the form's outputs with their graph."""
        with torch.no_grad():
            for leaf in self.leaves:
                for tensor in leaf.sharing:
                    if tensor is not leaf.tensor:
                        tensor.copy_(leaf.tensor)
        self.instance.restore()
        args, kwargs = self.instance.inputs()
        with torch.enable_grad(), self.promoted():
            return self.instance.call(self.captured.call, args, kwargs)

    @contextmanager
    def promoted(self) -> Iterator[None]:
        """Run the form's backward as its forward was run."""
        with nullcontext() if self._plain and not self._is_eager else super().promoted():
            yield

    def run(self, program: Recorder, *, is_plain: bool = False) -> Outputs:
        """Return eager's outputs."""
        self._is_eager = True
        try:
            return super().run(program, is_plain=is_plain)
        finally:
            self._is_eager = False


def form_runner(eager: ModelRunner, form_name: str) -> FormRunner:
    """Return the runner of one form, in float64.

    Raises:
        TargetError: GC116 the form cannot take this model, or not in float64; GC117 it gives no gradients.
    """
    instance: Instance = eager.instance
    native = Instance(instance.subject, input_mode=instance.input_mode)
    if form_name in WITHOUT_GRADIENTS:
        raise TargetError("GC117", f"form {form_name!r} has no gradients: there is nothing to check. Try export.")
    try:
        form = form_named(form_name)
        captured = form.capture(native)
        runner = FormRunner(eager, to_float64(form, captured, instance))
        runner.differentiate()
        return runner
    except CannotCapture as refusal:
        raise TargetError("GC116", f"{instance.subject.target}: {refusal.reason}", exit_code=4) from refusal
    except RuntimeError as error:
        raise TargetError(
            "GC116",
            f"{instance.subject.target}: {form_name} does not run in float64: {first_line(error)}.",
            exit_code=4,
        ) from error
