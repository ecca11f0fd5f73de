"""Arrangements of ranks that users write: two-dimensional meshes, sharded sequences, hybrid FSDP; right ones agree with
one process, and a published mistake in each is found.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gradctl.commands.compare import compare_one
from gradctl.subject.subject import Subject
from tests.forms.ranks.models import averaging, subject_of
from tests.ranks.stale_keys import StaleGather

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def two_dimensions(model, mesh):
    """Data parallelism by FSDP over pairs of ranks, each of which is tensor-parallel."""
    both = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=both["data"])


def hybrid(model, mesh):
    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def flat_shards(model, mesh):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def by_pairs(inputs, rank, world):
    return tuple(each.chunk(2)[rank // 2] for each in inputs)


RIGHT = {
    "two dimensions": ("ranks:4", {"parallelize": two_dimensions, "shard_inputs": by_pairs}),
    "hybrid FSDP": ("ranks:4", {"parallelize": hybrid}),
    "flat shards of FSDP 1": ("ranks:2", {"parallelize": flat_shards}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_arrangement_agrees_with_one_process(name):
    form, beside = RIGHT[name]
    unit = compare_one(subject_of(batch=8, **beside), form)
    assert (unit.verdict, unit.findings) == ("pass", ())


def test_a_module_that_is_called_without_its_wrapper_is_not_reduced():
    own = {"parallelize": lambda model, mesh: DistributedDataParallel(model).module}
    unit = compare_one(subject_of(**own), "ranks:2")
    names = {f"param:{each}" for each in ("0.weight", "0.bias", "2.weight", "2.bias")}
    for code in ("GC402", "GC620"):
        assert {each.tensor for each in unit.findings if each.code == code} == names


class Attention(nn.Module):
    """One head; ``gather`` collects keys and values of a sequence that is divided between ranks."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.gather = lambda x: x

    def forward(self, x):
        query, key, value = self.query(x), self.gather(self.key(x)), self.gather(self.value(x))
        return torch.softmax(query @ key.mT / 8**0.5, -1) @ value


class GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), 1)[dist.get_rank()]


class GatherWithoutReduction(GatherSequence):
    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def unit_of_sequence(gather):
    def parallelize(model, mesh):
        if gather is not None:
            model.gather = gather.apply
        return averaging()(model, mesh)

    def shard_inputs(inputs, rank, world):
        return tuple(each.chunk(world, 1)[rank] for each in inputs)

    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    beside = {"parallelize": parallelize, "shard_inputs": shard_inputs}
    return compare_one(Subject("attention", Attention(), (x,), beside=beside), "ranks:2")


def test_a_sequence_divided_between_ranks_agrees_if_attention_sees_all_of_it():
    assert unit_of_sequence(GatherSequence).verdict == "pass"
    alone = unit_of_sequence(None)  # each rank attends to its own part
    assert {("GC301", "output")} < {(each.code, each.tensor) for each in alone.findings}


def test_a_gather_whose_backward_is_not_reduced_has_right_outputs_and_wrong_gradients():
    unit = unit_of_sequence(GatherWithoutReduction)
    assert {each.code for each in unit.findings} == {"GC402"}
    tensors = {each.tensor for each in unit.findings}
    # The gradient of the key bias is zero only if all its parts are there.
    assert tensors == {"param:key.weight", "param:key.bias", "param:value.weight", "param:value.bias", "input:x"}


@pytest.mark.slow
def test_fifty_units_leave_no_process_no_file_and_no_port(tmp_path, monkeypatch):
    import os
    import tempfile
    from pathlib import Path

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def left() -> tuple[str, int, int]:
        """Return the child processes, and the numbers of open files, sockets among them, and of temporary files.

        A port belongs to the socket of a process; those of other programs are none of ours.
        """
        child = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return child, len(list(Path("/proc/self/fd").iterdir())), len(list(tmp_path.iterdir()))

    compare_one(subject_of(), "ddp:2")  # what is imported once
    before = left()
    for number in range(50):
        own = {"parallelize": averaging()} if number % 5 else {"parallelize": lambda model, mesh: 1 / 0}
        unit = compare_one(subject_of(**own), "ranks:2")
        assert unit.verdict == ("pass" if number % 5 else "inconclusive")
    assert left() == before


class _Columns(nn.Module):
    """A linear layer of which each rank has a part of the rows; ``scale`` is of the gradient of its input."""

    def __init__(self, whole, scale):
        super().__init__()
        rank, world = dist.get_rank(), dist.get_world_size()
        self.weight = nn.Parameter(whole.weight.detach().chunk(world)[rank])
        self.bias = nn.Parameter(whole.bias.detach().chunk(world)[rank])
        self.scale = scale

    def forward(self, x):
        x = x * self.scale + (x * (1 - self.scale)).detach()
        return StaleGather.apply(x @ self.weight.T + self.bias)


@pytest.mark.parametrize(
    ("requires_grad", "scale", "verdict", "code"),
    [
        (False, 1.0, "pass", "GC627"),  # data: nothing needs the sum
        (True, 1.0, "fail", "GC402"),  # something before the model is trained
        (False, 0.5, "fail", "GC402"),  # no part of the gradient: it is wrong
    ],
)
def test_parts_of_the_gradient_of_data_need_no_sum(requires_grad, scale, verdict, code):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)
    beside = {
        "parallelize": lambda model, mesh: _Columns(model, scale),
        "shard_inputs": lambda inputs, rank, world: inputs,
    }
    unit = compare_one(Subject("net", nn.Linear(4, 6), (x,), beside=beside), "ranks:2", named=True, allows=())
    assert unit.verdict == verdict
    assert code in {each.code for each in unit.findings}


def strided(inputs, rank, world):
    return tuple(each[rank::world] for each in inputs)


def zigzag(inputs, rank, world):
    """The first and the last part of a sequence to the first rank, those between to the other."""
    parts = inputs[0].chunk(2 * world, 1)
    return (torch.cat([parts[rank], parts[2 * world - 1 - rank]], 1),)


@pytest.mark.parametrize(("shard_inputs", "shape"), [(strided, (6, 4)), (zigzag, (2, 8, 4))])
def test_outputs_of_shares_in_another_order_are_put_back(shard_inputs, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for parallelize, verdict in ((averaging(), "pass"), (averaging("bias"), "fail")):
        beside = {"parallelize": parallelize, "shard_inputs": shard_inputs}
        unit = compare_one(Subject("net", nn.Linear(4, 3), (x,), beside=beside), "ranks:2", named=True, allows=())
        assert unit.verdict == verdict
        wrong = {each.tensor for each in unit.tensors if each.verdict not in ("same", "too-small")}
        assert wrong == (set() if verdict == "pass" else {"param:bias"})


def test_a_gradient_on_one_of_two_copies_is_a_warning():
    def parallelize(model, mesh):
        def drop(parameter):
            if dist.get_rank() == 1:
                parameter.grad = None

        model = averaging()(model, mesh)
        model.bias.register_post_accumulate_grad_hook(drop)
        return model

    unit = compare_one(subject_of(nn.Linear(4, 3), parallelize=parallelize), "ranks:2", named=True, allows=())
    assert [(each.code, each.severity, each.tensor) for each in unit.findings] == [("GC620", "warning", "param:bias")]


@pytest.mark.parametrize(("p", "verdict"), [(0.25, "pass"), (0.5, "fail")])
def test_another_probability_of_dropout_is_found_although_masks_are_replaced_by_their_means(p, verdict):
    def parallelize(model, mesh):
        model[1].p = p
        return DistributedDataParallel(model)

    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.25)).train()
    unit = compare_one(subject_of(model, parallelize=parallelize), "ranks:2", named=True, allows=())
    assert unit.verdict == verdict
    assert ("GC626" in {each.code for each in unit.findings}) == (verdict == "fail")


def test_a_factor_of_the_models_own_is_no_cause_of_the_reduction():
    class Twice(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = DistributedDataParallel(model)

        def forward(self, x):
            return self.model(x) * 2

    unit = compare_one(subject_of(parallelize=lambda model, mesh: Twice(model)), "ranks:2", named=True, allows=())
    assert unit.verdict == "fail"
    assert {each.cause for each in unit.findings if each.severity == "error"} == {None}
