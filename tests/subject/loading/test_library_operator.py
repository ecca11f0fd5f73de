"""An operator of ``torch.library`` as a target: found by object or by ``ns::op``, with the parameters of its schema."""

from __future__ import annotations

import inspect

import pytest
import torch

import gradctl
from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject

FILE = """
    import torch
    from torch import Tensor

    @torch.library.custom_op("gradctl_targets::scale", mutates_args=())
    def scale(x: Tensor, weight: Tensor, *, power: float = 1.0) -> Tensor:
        return x * weight**power

    packet = torch.ops.gradctl_targets.scale
    overload = torch.ops.gradctl_targets.scale.default

    def scale_inputs():
        return torch.ones(2, 3), torch.full((3,), 2.0)

    packet_inputs = overload_inputs = scale_inputs
"""
NAMES = ("scale", "packet", "overload", "gradctl_targets::scale")


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_is_a_function_of_the_parameters_of_its_schema(write, name):
    subject = load_subject(TargetOptions(f"{write('net.py', FILE)}:{name}"))
    assert str(inspect.signature(subject.model)) == "(x, weight, *, power=1.0)"
    assert torch.equal(subject.model(*subject.args), torch.full((2, 3), 2.0))


def test_an_operator_takes_inputs_by_the_names_of_its_schema(write):
    specs = ("weight=f32[3]", "x=f32[2,3]")
    subject = load_subject(TargetOptions(f"{write('net.py', FILE)}:gradctl_targets::scale", input_specs=specs))
    assert [tuple(value.shape) for value in subject.args] == [(2, 3), (3,)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradctl_targets::scal", "GC102 after the import of net.py there is no operator 'gradctl_targets::scal' "
         "(did you mean 'gradctl_targets::scale'?). Register it in net.py."),
        ("gradctl_targets::scale.out", "GC102 after the import of net.py there is no operator "
         "'gradctl_targets::scale.out' (did you mean 'gradctl_targets::scale'?). Register it in net.py."),
        ("gradctl_targets::", "GC102 'gradctl_targets::' after the colon of 'net.py:gradctl_targets::' is not a name. "
         "Write FILE.py:NAME."),
    ],
)  # fmt: skip
def test_an_operator_that_is_not_registered_is_one_sentence(write, name, message):
    with pytest.raises(TargetError) as caught:
        load_subject(TargetOptions(f"{write('net.py', FILE)}:{name}"))
    assert (str(caught.value), caught.value.exit_code) == (message, 2)


def test_an_operator_has_no_constructor_arguments(write):
    with pytest.raises(TargetError, match=r"GC108 'scale' is an operator of torch\.library: it has no constructor"):
        load_subject(TargetOptions(f"{write('net.py', FILE)}:scale", arguments=("power=2",)))


def test_an_operator_with_several_overloads_takes_its_inputs_by_position():
    report = gradctl.gradcheck(torch.ops.aten.mul, (torch.randn(3), torch.randn(3)))
    assert {row.tensor for unit in report.units for row in unit.tensors} == {"input:args.0", "input:args.1"}
    assert report.verdict == "pass"
