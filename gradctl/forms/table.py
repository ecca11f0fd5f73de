"""The forms, by name. ``core.names.FORMS`` lists the same without importing torch; a test says that they agree."""

from __future__ import annotations

import importlib
from typing import cast

from gradctl.core.names import RANK_FORMS
from gradctl.forms.form import Form

FORM_MODULES = {
    "eager": "gradctl.forms.eager",
    "trace": "gradctl.forms.torchscript.trace",
    "script": "gradctl.forms.torchscript.script",
    "export": "gradctl.forms.exported.export",
    "export-joint": "gradctl.forms.exported.export_joint",
    "aot": "gradctl.forms.compiled.aot",
    "compile": "gradctl.forms.compiled.compile",
    "onnx": "gradctl.forms.onnx.forward",
    "onnx-joint": "gradctl.forms.onnx.joint",
    "openvino": "gradctl.forms.runtimes.openvino",
    "openvino-joint": "gradctl.forms.runtimes.openvino_joint",
    "executorch": "gradctl.forms.runtimes.executorch",
    "executorch-joint": "gradctl.forms.runtimes.executorch_joint",
}
_RANK_FORM = "gradctl.forms.ranks.rank_form"


def form_named(name: str) -> Form:
    """Return the module of one form, imported on demand: ``compile`` imports inductor."""
    if name in RANK_FORMS:
        kind, _, world = name.partition(":")
        return cast(Form, importlib.import_module(_RANK_FORM).RankForm(kind, int(world)))
    return cast(Form, importlib.import_module(FORM_MODULES[name]))
