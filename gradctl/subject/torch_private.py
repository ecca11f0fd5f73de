"""Every private name of torch that gradctl uses: the one list, to be read when a new version of torch comes out.

All were seen in 2.10, the oldest version that gradctl supports, in 2.13, and in 2.14, the newest; a comment says what
differs. A name is looked up at its first use, because some of the modules take a second to import.

Private attributes of torch's objects cannot be listed by name; these are used: ``Tensor._version``,
``OpOverload._schema``, ``UntypedStorage._cdata``, ``_forward_cls`` of a custom Function's node,
``Parameter._post_accumulate_grad_hooks``, ``TorchDispatchMode._should_skip_dynamo``, ``forward_ad._current_level``.
What may be absent is looked for where it is used: the classes of ``torch._higher_order_ops`` (tracing/control_flow),
Dynamo (commands/doctor) and ``torch.export._patches`` (forms/onnx/forward).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradctl.core.errors import ResourceError

# By the name here: module and name in torch.
_NAMES = {
    # Tensors as torch's C code has them: its properties are what a function mode is called with.
    "TensorBase": "torch:_C.TensorBase",
    "DisableTorchFunction": "torch:_C.DisableTorchFunction",
    "set_grad_enabled": "torch:_C._set_grad_enabled",
    # Transforms of torch.func: those that are running, and the tensors that they wrap.
    "peek_interpreter_stack": "torch:_C._functorch.peek_interpreter_stack",
    "without_transforms": "torch._functorch.pyfunctorch:temporarily_clear_interpreter_stack",
    "is_wrapped_tensor": "torch:_C._functorch.is_functorch_wrapped_tensor",
    "batch_dimension": "torch:_C._functorch.maybe_get_bdim",
    "unwrapped": "torch:_C._functorch.get_unwrapped",
    # Custom Functions. Up to 2.13 Function.apply is Python and ends in super().apply, found on _SingleLevelFunction: an
    # attribute there is met by every apply, also by one bound to a name long ago. In 2.14 Function.apply is a C method,
    # and one that was bound to a name before is not seen.
    "SingleLevelFunction": "torch.autograd.function:_SingleLevelFunction",
    "FunctionBase": "torch:_C._FunctionBase",
    "UndefinedGrad": "torch:_C._functions.UndefinedGrad",
    "saved_tensors_hooks_disabled": "torch:_C._autograd._saved_tensors_hooks_get_disabled_error_message",
    # Samples whose gradient is an implicit reparameterisation.
    "Dirichlet": "torch.distributions.dirichlet:_Dirichlet",
    "dirichlet_grad": "torch:_dirichlet_grad",
    "standard_gamma": "torch:_standard_gamma",
    # Operators, and what they are given.
    "OpOverload": "torch._ops:OpOverload",
    "OpOverloadPacket": "torch._ops:OpOverloadPacket",
    "CustomOpDef": "torch._library.custom_ops:CustomOpDef",
    "registered_operators": "torch:_C._dispatch_get_all_op_names",
    "pytree_nodes": "torch.utils._pytree:SUPPORTED_NODES",
    "tree_structure": "torch.utils._pytree:tree_structure",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
    "tree_map": "torch.utils._pytree:tree_map",
    "tree_unflatten": "torch.utils._pytree:tree_unflatten",
    "tree_flatten_spec": "torch.fx._pytree:tree_flatten_spec",
    "scan": "torch._higher_order_ops.scan:scan_op",
    # Tracing: fake tensors, dispatch, decompositions, and autograd's numbering of nodes.
    "DispatchKey": "torch:_C.DispatchKey",
    "DisableTorchDispatch": "torch:_C._DisableTorchDispatch",
    "enable_python_dispatcher": "torch._dispatch.python:enable_python_dispatcher",
    "detect_fake_mode": "torch._guards:detect_fake_mode",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "MetadataMismatchError": "torch._subclasses.fake_tensor:MetadataMismatchError",
    "UnsupportedOperatorException": "torch._subclasses.fake_tensor:UnsupportedOperatorException",
    "DataDependentOutputException": "torch._subclasses.fake_tensor:DataDependentOutputException",
    "DynamicOutputShapeException": "torch._subclasses.fake_tensor:DynamicOutputShapeException",
    "register_op_impl": "torch._subclasses.fake_impls:register_op_impl",
    "deregister_op_impl": "torch._subclasses.fake_impls:_deregister_op_impl",
    "core_aten_decompositions": "torch._decomp:core_aten_decompositions",
    "decompositions": "torch._decomp.decompositions:",
    "current_autograd_node": "torch:_C._current_autograd_node",
    "sequence_number": "torch.autograd:_get_sequence_nr",
    # TorchScript.
    "create_function_from_graph": "torch:_C._create_function_from_graph",
    # Compilers.
    "CompilerBisector": "torch._inductor.compiler_bisector:CompilerBisector",
    "inductor_config": "torch._inductor.config:",
    "reset_dynamo": "torch._dynamo:reset",
    "dynamo_config": "torch._dynamo.config:",
    "dynamo_counters": "torch._dynamo.utils:counters",
    "explain_dynamo": "torch._dynamo:explain",
    "compilation_metrics": "torch._dynamo.utils:get_compilation_metrics",
    "clear_compilation_metrics": "torch._dynamo.utils:clear_compilation_metrics",
}


def __getattr__(name: str) -> Any:
    """Return the object of torch with this name here.

    Raises:
        ResourceError: GC804 this version of torch has no such object.
    """
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = _NAMES[name]
    try:
        globals()[name] = found = pkgutil.resolve_name(where)
    except (ImportError, AttributeError) as error:
        raise ResourceError(
            "GC804",
            f"torch {torch.__version__} has no {where.strip(':').replace(':', '.')}, which gradctl needs. "
            "Install a version from 2.10 to 2.14.",
        ) from error
    return found


@contextmanager
def patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class of torch for a while; one that is inherited is inherited again after."""
    missing = object()
    before = vars(holder).get(name, missing)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(holder, name)
        else:
            setattr(holder, name, before)
