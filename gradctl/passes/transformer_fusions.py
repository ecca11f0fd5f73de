"""onnxruntime.transformers: attention, skip layer norm, bias and GELU as one operator each, if a graph has them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from gradctl.forms.silence import silenced
from gradctl.graphdiff.graph_view import operators
from gradctl.onnxio.submodel import copy_of
from gradctl.onnxio.validation import nodes
from gradctl.passes.onnx_ir import without_unused_opsets
from gradctl.passes.pass_result import NotApplicable, onnx_opset

# The kinds of model, which select onnxruntime's patterns; exporters write them into names, without the underscore.
_KINDS = ("gpt_neox", "gpt2", "clip", "swin", "vit", "bart", "t5", "conformer")
_NORMS = ("LayerNormalization", "ReduceMean", "SkipLayerNormalization", "RMSNormalization")
_METADATA = "pkg.torch.onnx.class_hierarchy"


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with the fusions for its kind of transformer.

    Raises:
        NotApplicable: the graph is not a transformer.
    """
    kind = model_type(model)
    if kind is None:
        raise NotApplicable("the graph is no transformer: it has no attention (Softmax, two MatMul) with a norm.")
    fused = _fused(model, kind, norms=True)
    # An RMS norm becomes an operator in ONNX's own domain, which ONNX does not define (onnxruntime 1.32).
    return fused if _is_standard(fused) else _fused(model, kind, norms=False)


def _fused(model: onnx.ModelProto, kind: str, *, norms: bool) -> onnx.ModelProto:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions(kind)
    options.enable_layer_norm = norms
    with silenced(), tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "fused.onnx"
        # A copy, since the fusions are made in place; the operator set of new operators is imported only by saving.
        fused = optimize_model(copy_of(model), model_type=kind, optimization_options=options, opt_level=0)
        fused.save_model_to_file(str(path))
        return without_unused_opsets(onnx.load(path))


def _is_standard(model: onnx.ModelProto) -> bool:
    """Return whether ONNX defines all operators in its own domain."""
    version = onnx_opset(model) or 0
    own = {node.op_type for node in nodes(model) if node.domain in ("", "ai.onnx")}
    return all(onnx.defs.has(name, version, "") for name in own)


def model_type(model: onnx.ModelProto) -> str | None:
    """Return the kind of transformer in onnxruntime's terms, ``bert`` by default; None if it is not a transformer."""
    counts = operators(model)
    if "Softmax" not in counts or counts.get("MatMul", 0) < 2 or counts.keys().isdisjoint(_NORMS):
        return None
    names = [model.graph.name, *(each.name for each in model.graph.initializer)]
    names += [kept.value for node in model.graph.node for kept in node.metadata_props if kept.key == _METADATA]
    text = " ".join(names).lower()
    return next((kind for kind in _KINDS if kind.replace("_", "") in text), "bert")
