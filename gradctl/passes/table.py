"""The table of passes, in the order in which a level runs them."""

from __future__ import annotations

from gradctl.core.errors import nearest
from gradctl.passes import onnx_ir, onnxscript, onnxslim
from gradctl.passes.onnxruntime import offline_pass
from gradctl.passes.pass_result import Pass
from gradctl.passes.transformer_fusions import fuse

LEVELS = ("safe", "default", "max")

_ORT = "onnxruntime"
_ALL = [
    *(
        Pass(f"ir-{name}", "safe", "onnx-ir", does, apply, may_grow=name == "inline")
        for name, (does, apply) in onnx_ir.PASSES.items()
    ),
    Pass("fold", "default", "onnxscript", "computes what depends on constants alone", onnxscript.fold),
    Pass("onnxscript", "default", "onnxscript", "folds, inlines, removes until nothing changes", onnxscript.optimize),
    Pass("rewrite", "default", "onnxscript", "applies onnxscript's own rewrite rules", onnxscript.rewrite),
    Pass("slim", "default", "onnxslim", "folds, removes and fuses patterns", onnxslim.slim, onnxslim.missing),
    Pass("ort-basic", "default", _ORT, "folds, removes, and fuses into ONNX's own operators", offline_pass("BASIC")),
    Pass("transformers", "max", _ORT, "fuses attention, norms and GELU into onnxruntime's operators", fuse),
    Pass("ort-extended", "max", _ORT, "fuses into onnxruntime's own operators", offline_pass("EXTENDED")),
    Pass("ort-all", "max", _ORT, "changes layouts for this processor too", offline_pass("ALL"), tied_to_machine=True),
]

PASSES: dict[str, Pass] = {each.name: each for each in _ALL}


def passes_of_level(level: str) -> list[Pass]:
    """Return the passes of a level, those of lower levels first."""
    included = LEVELS[: LEVELS.index(level) + 1]
    return [each for each in PASSES.values() if each.level in included]


def pass_named(name: str) -> Pass:
    """Return a pass by its name.

    Raises:
        ValueError: it is unknown; the message suggests the nearest name.
    """
    if name not in PASSES:
        raise ValueError(f"no pass {name!r}{nearest(name, PASSES)}; 'gradctl optimize --list-passes' lists them.")
    return PASSES[name]
