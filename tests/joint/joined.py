"""What tests of the joint graph hold together: onnxruntime on the exported ModelProto, and torch's autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from gradctl.core.names import output_name
from gradctl.forms.onnx.joint import export_graph
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves

__all__ = ["by_autograd", "by_onnxruntime", "differing", "joint_graph"]


def joint_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> onnx.ModelProto:
    """Return the joint graph of a model, whole and valid."""
    instance = Instance(Subject(target="test", model=model, args=args, kwargs=kwargs), keep_hooks=True)
    proto = ir.to_proto(export_graph(instance).artifact)
    onnx.checker.check_model(proto, full_check=True)
    assert {each.domain for each in proto.opset_import} == {""}
    return proto


def by_onnxruntime(proto: onnx.ModelProto, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all that a graph gives, with onnxruntime's own optimiser off: it may repair ours."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {each.name: values[each.name].detach().numpy() for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(None, feeds), strict=True)}


def by_autograd(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the joint graph of a model is given, cotangents drawn here, and what it is to give."""
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy((args, kwargs))
    module = model if isinstance(model, nn.Module) else nn.Module()
    inputs = {f"input.{name}": each for name, each in input_names(model, args, kwargs) if isinstance(each, Tensor)}
    for each in inputs.values():
        each.requires_grad_(each.is_floating_point())
    sources = {**dict(module.named_parameters()), **inputs}
    given = {name: each.detach().clone() for name, each in {**sources, **dict(module.named_buffers())}.items()}
    outputs = {output_name(path): leaf for path, leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)}
    asking = {name: each for name, each in outputs.items() if each.requires_grad}
    cotangents = {f"grad_{name}": torch.randn_like(each) for name, each in asking.items()}
    torch.autograd.backward(list(asking.values()), list(cotangents.values()))
    gradients = {f"grad.{name}": each.grad for name, each in sources.items() if each.grad is not None}
    updated = {f"updated.{name}": each for name, each in module.named_buffers() if not torch.equal(each, given[name])}
    return {**given, **cotangents}, {**outputs, **gradients, **updated}


def differing(model: Callable[..., Any], *args: Any, rtol: float = 1e-5, **kwargs: Any) -> list[str]:
    """Return names of what the joint graph of a model lacks, or has besides, or gives otherwise than autograd.

    The graph is made of one set of weights and inputs and run with another.

    Args:
        model: deterministic; it is copied.
        rtol: of the largest entry of each tensor; float32's 1e-7 times what a sum of some hundred terms adds. A
            tenth of it counts by the largest of all gradients: that of attention's key bias is zero but for rounding.
    """
    proto = joint_graph(copy.deepcopy(model), *args, **kwargs)
    moved = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters() if isinstance(moved, nn.Module) else ():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    args, kwargs = _moved(args), _moved(kwargs)
    values, expected = by_autograd(moved, *args, **kwargs)
    found = by_onnxruntime(proto, values)
    wrong = sorted(expected.keys() ^ found.keys())
    scale = max(_largest(each) for name, each in expected.items() if name.startswith("grad."))
    for name in expected.keys() & found.keys():
        want, got = expected[name].detach(), found[name]
        atol = rtol * max(_largest(want), scale / 10 if name.startswith("grad.") else 0.0)
        if want.shape != got.shape or want.dtype != got.dtype or not torch.allclose(got, want, rtol=0, atol=atol):
            wrong.append(name)
    return wrong


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.is_floating_point() and value.numel() else 0.0


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _moved(each) for name, each in value.items()}
    return tuple(map(_moved, value)) if isinstance(value, tuple) else value
