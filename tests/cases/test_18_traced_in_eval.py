"""Case 18: a model traced in evaluation mode, then put into training mode: BatchNorm and Dropout stay as they were.

Held against the model in training mode the trace is wrong in outputs, gradients and statistics. An exported module
refuses ``.train()``. Twin: traced in the mode it is used in.
"""

import pytest
import torch
from torch import nn

from gradctl.forms.table import form_named
from gradctl.forms.torchscript.scripted_module import wrap_script
from tests.compared import causes, comparing, different

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())


def unit_of(traced, model):
    return comparing(model, X).captured(wrap_script("trace", traced), form_named("trace"))


def test_plain_torch_leaves_batch_norm_baked():
    traced = torch.jit.trace(net().eval(), (X,)).train()
    assert torch.allclose(traced(X), net().eval()(X))
    assert not torch.allclose(traced(X), net().train()(X), atol=0.1)


def test_traced_in_eval_it_is_not_the_model_in_training():
    unit = unit_of(torch.jit.trace(net().eval(), (X,)).train(), net().train())
    found = different(unit)
    assert causes(unit) == {"GC209"}
    assert found["output"] == "GC301"
    assert found["param:0.weight"] == "GC402"
    assert {found[f"buffer:1.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked")} == {"GC302"}


def test_traced_in_eval_it_is_the_model_in_eval():
    assert unit_of(torch.jit.trace(net().eval(), (X,)), net().eval()).verdict == "pass"


def test_traced_in_training_it_is_the_model_in_training():
    model = net().train()
    traced = torch.jit.trace(model, (X,), check_trace=False)
    model.load_state_dict(net().state_dict())  # tracing moved the statistics that it shares with the model
    assert unit_of(traced, net().train()).verdict == "pass"


def test_an_exported_module_refuses_to_change_its_mode():
    module = torch.export.export(net().eval(), (X,)).module()
    with pytest.raises(NotImplementedError, match="train"):
        module.train()
