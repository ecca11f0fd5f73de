"""Batch norm, weight norm, and distances: outputs, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, values
from tests.joint.joined import by_autograd, by_onnxruntime, differing, joint_graph

_BATCHES = [(6, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 3)]


def _batch(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1


@pytest.mark.parametrize("shape", _BATCHES)
@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_is_normalized_by_its_own_statistics(shape: tuple[int, ...], affine: bool) -> None:
    weight, bias = (_batch(3), _batch(3)) if affine else (None, None)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.ops.aten._native_batch_norm_legit(x, *(parameters or (None, None)), True, 0.1, 1e-3)[0]

    parameters = (weight, bias) if weight is not None and bias is not None else ()
    assert_as_torch({"_native_batch_norm_legit"}, function, _batch(*shape), *parameters)


@pytest.mark.parametrize("shape", _BATCHES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_move_as_those_of_torch_do(shape: tuple[int, ...], training: bool, momentum: float) -> None:
    x, mean, variance, weight = _batch(*shape), _batch(3), _batch(3).abs(), _batch(3)
    found = TABLE[torch.ops.aten._native_batch_norm_legit_functional.default](
        x, weight, None, mean, variance, training, momentum, 1e-3
    )
    moved_mean, moved_variance = mean.clone(), variance.clone()
    output = F.batch_norm(x, moved_mean, moved_variance, weight, None, training, momentum, 1e-3)
    torch.testing.assert_close(found[0], output)
    torch.testing.assert_close(found[3:], (moved_mean, moved_variance))


class _Statistics(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.native_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, 1e-3
        )


def test_the_operator_itself_gives_no_statistics_where_it_takes_none() -> None:
    model, x = _Statistics(3).eval(), _batch(4, 3, 5).float()
    given, expected = by_autograd(model, x)
    found = by_onnxruntime(joint_graph(model, x), given)
    assert found["output.1"].shape == found["output.2"].shape == (0,)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(nn.BatchNorm1d(3), (6, 3), id="no-axis"),
        pytest.param(nn.BatchNorm1d(3, affine=False), (4, 3, 5), id="one-axis"),
        pytest.param(nn.BatchNorm2d(3, momentum=0.4), (2, 3, 4, 5), id="two-axes"),
        pytest.param(nn.BatchNorm3d(3, eps=0.1), (2, 3, 2, 4, 3), id="three-axes"),
        pytest.param(nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 5), id="no-statistics"),
        pytest.param(nn.BatchNorm2d(3).eval(), (2, 3, 4, 5), id="evaluated"),
        pytest.param(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (2, 3, 4, 5), id="instances"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 6, 5), id="convolved"),
        pytest.param(nn.GroupNorm(3, 6), (2, 6, 4), id="groups"),
        pytest.param(nn.LayerNorm((4, 5), bias=False), (2, 3, 4, 5), id="layer"),
        pytest.param(nn.RMSNorm((5,)), (2, 3, 4, 5), id="root-mean-square"),
    ],
)
def test_onnxruntime_gives_outputs_gradients_and_statistics(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = _batch(*shape).float()
    given, expected = by_autograd(copy.deepcopy(model), x)
    running = [name for name, _ in model.named_buffers() if "running" in name]
    statistics = {f"updated.{name}" for name in running} if model.training else set()
    assert statistics <= expected.keys()
    found = by_onnxruntime(joint_graph(model, x), given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A bias before a BatchNorm has a gradient of 0, which is the rest of a sum of some 1e1.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 2])
def test_a_normed_weight_has_the_gradients_of_torch(dim):
    direction, length = values(3, 4, 5), values(3, 1, 1) if dim == 0 else values(1, 1, 5)
    used = {"_weight_norm_interface_backward"}
    assert_as_torch(used, lambda v, g: torch.ops.aten._weight_norm_interface(v, g, dim)[0], direction, length)


def test_a_normed_layer_is_right_in_onnxruntime():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert differing(layer, values(2, 4).float()) == []


EXACT = "donot_use_mm_for_euclid_dist"


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, torch.inf])
@pytest.mark.parametrize("batches", [((2,), (2,)), ((), (2,)), ((), ())])
def test_distances_of_two_sets_and_a_pair_of_equal_rows(p, batches):
    first, second = values(*batches[0], 5, 3), values(*batches[1], 4, 3, seed=1)
    second[..., 0, :] = first[..., 1, :]
    second[..., 1, 1] = first[..., 2, 1]
    used = {"_cdist_forward", "_cdist_backward"}
    assert_as_torch(used, lambda a, b: torch.cdist(a, b, p, EXACT), first, second)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, torch.inf])
def test_distances_within_one_set(p):
    first = values(5, 3)
    first[1] = first[3]
    assert_as_torch({"_pdist_forward", "_pdist_backward"}, lambda a: torch.pdist(a, p), first)


@pytest.mark.parametrize("p", [1.5, 2.0, torch.inf])
def test_distances_are_right_in_onnxruntime(p):
    def distances(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.cdist(a, b, p, EXACT), torch.pdist(a, p)

    assert differing(distances, values(5, 3).float(), values(4, 3, seed=1).float()) == []
