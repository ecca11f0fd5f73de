"""``torch.compile`` with inductor."""

from __future__ import annotations

from gradctl.forms.compiled.dynamo import compile_with
from gradctl.forms.form import Captured
from gradctl.subject.instance import Instance


def capture(instance: Instance) -> Captured:
    """Return the model compiled with inductor, random numbers drawn as eager draws them (pytorch 113169).

    Raises:
        CannotCapture: as ``compile_with``.
    """
    # As an option it also applies if another input triggers a recompilation; a patch of the configuration would not.
    return compile_with("compile", instance, "inductor", {"options": {"fallback_random": True}})
