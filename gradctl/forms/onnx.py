"""ONNX, forward: exported by torch's dynamo exporter, checked, and run by onnxruntime on the CPU."""

from __future__ import annotations

import io
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from gradctl.forms.export import FunctionModule
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.quiet import quiet
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["capture", "widened"]


class _Session:
    """An ONNX model that is called like the model it came from, and gives outputs in the same structure.

    Args:
        model: the exported model.
        structure: an output of eager, whose tensors stand for the session's outputs in order.
    """

    def __init__(self, model: onnx.ModelProto, structure: Any) -> None:
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), _silent_options(), providers=["CPUExecutionProvider"]
        )
        self.structure = structure
        self.names = [each.name for each in self.session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of one run."""
        tensors = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.names):
            raise ValueError(f"the ONNX graph takes {len(self.names)} inputs, and {len(tensors)} tensors are given")
        feeds = {name: _as_numpy(tensor) for name, tensor in zip(self.names, tensors, strict=True)}
        found = iter(self.session.run(None, feeds))
        return map_leaves(lambda _, leaf: _as_tensor(next(found)) if isinstance(leaf, Tensor) else leaf, self.structure)


def capture(instance: Instance) -> Captured:
    """Return the model exported to ONNX on its own inputs; it gives outputs only.

    Raises:
        CannotCapture: the exporter, the checker or onnxruntime refuses the model.
    """
    start = perf_counter()
    instance.restore()
    args, kwargs = instance.inputs()
    module = instance.model if isinstance(instance.model, nn.Module) else FunctionModule(instance.model)
    try:
        with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            with torch.enable_grad():  # a model may take gradients inside
                structure = instance.model(*args, **kwargs)
            instance.restore()
            args, kwargs = instance.inputs()
            program = torch.onnx.export(module, args, kwargs=kwargs, dynamo=True, verbose=False)
            if program is None:
                raise CannotCapture("torch.onnx.export returned no program.")
            model = program.model_proto
            onnx.checker.check_model(model)
            session = _Session(model, structure)
            instance.restore()
            outputs = [leaf for _, leaf in leaves(structure) if isinstance(leaf, Tensor)]
            if len(outputs) != len(session.session.get_outputs()):
                given = len(session.session.get_outputs())
                raise CannotCapture(f"the ONNX graph gives {given} outputs where eager gives {len(outputs)} tensors.")
            session(*args, **kwargs)
    except CannotCapture:
        raise
    except Exception as error:  # the exporter, onnxruntime or the user's model may raise anything
        raise CannotCapture(f"no ONNX graph that runs: {first_line(_root(error))}", traceback.format_exc()) from error
    finally:
        instance.restore()
    operators = dict(Counter(node.op_type for node in model.graph.node).most_common())
    return Captured(
        "onnx",
        session,
        seconds=perf_counter() - start,
        gives=frozenset({"output"}),
        operators=operators,
        artifact=model,
    )


def widened(captured: Captured, instance: Instance) -> Captured:
    """Refuse: onnxruntime has no float64 kernels for Conv, Erf and others.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture(
        "onnxruntime has no float64 kernels for many operators; outputs are judged in the native dtype."
    )


def _root(error: BaseException) -> BaseException:
    """Return what an exporter's wrapping of errors was about."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _silent_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def _as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _as_tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value))
