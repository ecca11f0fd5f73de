"""AOTAutograd with eager kernels: what ``torch.compile`` captures, forward and backward, before inductor."""

from __future__ import annotations

from gradctl.forms.compiled.dynamo import compile_with
from gradctl.forms.form import Captured
from gradctl.subject.instance import Instance


def capture(instance: Instance) -> Captured:
    """Return the model compiled with the backend ``aot_eager``.

    Raises:
        CannotCapture: as ``compile_with``.
    """
    return compile_with("aot", instance, "aot_eager", {})
