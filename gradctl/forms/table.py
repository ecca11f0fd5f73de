"""The forms, by name. ``core.names.FORMS`` lists the same without importing torch; a test says that they agree."""

from __future__ import annotations

import importlib
from typing import cast

from gradctl.core.names import FORMS
from gradctl.forms.form import Form

__all__ = ["form_named"]


def form_named(name: str) -> Form:
    """Return the module of one form; importing ``compile`` imports inductor, so only what is asked for is."""
    assert name in FORMS
    return cast(Form, importlib.import_module(f"gradctl.forms.{name.replace('-', '_')}"))
