"""Which operators are the user's."""

from __future__ import annotations

import subprocess
import sys

import torch

from gradctl.tracing.custom_operators import OperatorCalls, has_users_operators, is_users_operator

MODULES = (
    "torch._dynamo, torch._inductor.compile_fx, torch.onnx, torch.export, torch.distributed.tensor, "
    "transformers.integrations.moe, torch.testing._internal.optests, torch.nn.attention.flex_attention, "
    "torch.ao.quantization.fx"
)


def test_no_operator_of_torch_is_the_users():
    program = f"import {MODULES}\nprint(*torch._C._dispatch_get_all_op_names())"
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) > 2000
    assert {name for name in listed if is_users_operator(name.partition("::")[0])} == set()


def test_the_call_that_requires_a_gradient_is_kept_as_it_was_before_it():
    @torch.library.custom_op("gradctl_recorded::double_", mutates_args={"x"})
    def double_(x: torch.Tensor, by: float) -> None:
        x.mul_(by)

    assert has_users_operators()
    with OperatorCalls() as calls:
        double_(torch.ones(1), 2.0)
        double_(torch.full((2,), 3.0, requires_grad=True).clone(), 2.0)
        torch.ones(1) + 1
    (call,) = calls
    assert (call.operator, call.requires_grad) == (torch.ops.gradctl_recorded.double_.default, True)
    assert torch.equal(call.args[0], torch.full((2,), 3.0)) and call.args[1] == 2.0
    assert call.place[0] == __file__
