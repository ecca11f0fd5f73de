"""onnxruntime.transformers: attention, skip layer norm, bias and GELU in one operator each, where a graph has them."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx

from gradctl.forms.silence import silenced
from gradctl.graphdiff.graph_view import operators
from gradctl.onnxio.validation import nodes
from gradctl.passes.onnx_ir import without_unused_opsets
from gradctl.passes.pass_result import NotApplicable

# A word in the names that an exporter keeps → the kind of model, whose patterns onnxruntime looks for.
_WORDS = {
    "gptneox": "gpt_neox",
    "gpt2": "gpt2",
    "clip": "clip",
    "swin": "swin",
    "vit": "vit",
    "bart": "bart",
    "t5": "t5",
    "conformer": "conformer",
}
_NORMS = ("LayerNormalization", "ReduceMean", "SkipLayerNormalization", "RMSNormalization")
_METADATA = "pkg.torch.onnx.class_hierarchy"


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with the fusions for its kind of transformer.

    Raises:
        NotApplicable: it is none.
    """
    kind = model_type(model)
    if kind is None:
        raise NotApplicable("the graph is no transformer: it has no attention (Softmax, two MatMul) with a norm.")
    fused = _fused(model, kind, norms=True)
    # An RMS norm becomes an operator that onnxruntime puts among ONNX's own, which has none of that name (1.32).
    return fused if _is_of_onnx(fused) else _fused(model, kind, norms=False)


def _fused(model: onnx.ModelProto, kind: str, *, norms: bool) -> onnx.ModelProto:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions(kind)
    options.enable_layer_norm = norms
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # the fusions are made in place
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with silenced(), tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            path = Path(folder) / "fused.onnx"
            # Only when it is saved does it import the operator set of what it fused.
            fused = optimize_model(copy, model_type=kind, optimization_options=options, opt_level=0)
            fused.save_model_to_file(str(path))
            return without_unused_opsets(onnx.load(path))
    finally:
        logging.disable(before)


def _is_of_onnx(model: onnx.ModelProto) -> bool:
    """Return whether ONNX has all operators that say they are its own."""
    version = {each.domain: each.version for each in model.opset_import}.get("", 0)
    own = {node.op_type for node in nodes(model) if node.domain in ("", "ai.onnx")}
    return all(onnx.defs.has(name, version, "") for name in own)


def model_type(model: onnx.ModelProto) -> str | None:
    """Return which of onnxruntime's kinds of transformer a graph is, ``bert`` where nothing says more; None if none."""
    kinds = operators(model)
    is_attention = "Softmax" in kinds and kinds.get("MatMul", 0) >= 2
    if not is_attention or not any(norm in kinds for norm in _NORMS):
        return None
    said = [model.graph.name, *(each.name for each in model.graph.initializer)]
    said += [kept.value for node in model.graph.node for kept in node.metadata_props if kept.key == _METADATA]
    text = " ".join(said).lower()
    return next((kind for word, kind in _WORDS.items() if word in text), "bert")
