"""What a model remembers is put back before each run, whatever it is, and what did not change is left alone."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from gradctl.subject.state import State


class Remembers(nn.Module):
    """A module with one of everything that a forward changes in practice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.calls, self.cache, self.recent, self.table = 0, [], deque([1]), {"a": torch.ones(2)}
        self.torch_generator, self.numpy_generator = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.array = np.zeros(2)


def grown_buffer(module: Remembers) -> None:
    module.mean.resize_(5).fill_(1.0)


def replaced_buffer(module: Remembers) -> None:
    module.mean = torch.ones(7)


def tensor_in_a_table(module: Remembers) -> None:
    module.table["a"].add_(1)
    module.table["b"] = torch.ones(1)


CHANGES = {
    "buffer in place": lambda module: module.mean.add_(1.0),
    "grown buffer": grown_buffer,
    "replaced buffer": replaced_buffer,
    "counter": lambda module: setattr(module, "calls", module.calls + 1),
    "new attribute": lambda module: setattr(module, "extra", 1),
    "list": lambda module: module.cache.append(torch.ones(1)),
    "deque": lambda module: module.recent.append(2),
    "dict": tensor_in_a_table,
    "torch generator": lambda module: torch.rand(3, generator=module.torch_generator),
    "numpy generator": lambda module: module.numpy_generator.random(3),
    "numpy array": lambda module: module.array.fill(9.0),
    "training flag": lambda module: module.eval(),
}


def observed(module: Remembers) -> list[object]:
    return [
        module.mean.tolist(),
        module.calls,
        hasattr(module, "extra"),
        len(module.cache),
        list(module.recent),
        {key: value.tolist() for key, value in module.table.items()},
        module.torch_generator.get_state().tolist(),
        module.numpy_generator.bit_generator.state,
        module.array.tolist(),
        module.training,
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_undone_each_time(name):
    module = Remembers()
    state, before = State([module]), observed(module)
    for _ in range(2):
        CHANGES[name](module)
        assert observed(module) != before
        state.restore()
        assert observed(module) == before


def test_the_state_of_a_custom_object_is_put_back_too():
    class Cache:
        def __init__(self) -> None:
            self.keys: list[int] = []

    module = nn.Identity()
    module.cache = Cache()
    state = State([module])
    module.cache.keys.append(1)
    state.restore()
    assert module.cache.keys == []


def test_a_function_keeps_what_it_closes_over():
    seen: list[int] = []

    def function(x: int) -> None:
        seen.append(x)

    state = State([function])
    function(1)
    state.restore()
    assert seen == []


def test_an_excluded_tensor_is_left_as_it_is():
    module = nn.Linear(2, 2)
    state = State([module], excluded=[module.weight])
    with torch.no_grad():
        module.weight.fill_(7.0)
    state.restore()
    assert module.weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_running_statistics_are_put_back_though_batch_norm_counts_no_version():
    module = nn.BatchNorm1d(3).train()
    state = State([module])
    module(torch.randn(4, 3) + 5)
    state.restore()
    assert module.running_mean is not None and module.running_mean.tolist() == [0.0, 0.0, 0.0]


class Scripted(nn.Module):
    """Assigns a buffer and a number, which a script keeps outside Python."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = self.mean + x
        return self.mean * self.calls


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_script_assigns_is_put_back(nested):
    script = torch.jit.script(nn.Sequential(Scripted()) if nested else Scripted())
    state, x = State([script]), torch.tensor([1.0, 2.0, 3.0])
    for _ in range(2):
        assert [script(x).tolist(), script(x).tolist()] == [[1.0, 2.0, 3.0], [4.0, 8.0, 12.0]]
        state.restore()
        assert dict(script.named_buffers()).popitem()[1].tolist() == [0.0, 0.0, 0.0]


def test_a_script_from_a_file_has_its_buffers_put_back(tmp_path):
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "script.pt")
    script = torch.jit.load(tmp_path / "script.pt")
    state = State([script])
    script(torch.ones(3))
    state.restore()
    assert script.mean.tolist() == [0.0, 0.0, 0.0]


def test_an_exported_module_has_its_buffers_put_back():
    module = torch.export.export(nn.BatchNorm1d(3).train(), (torch.randn(4, 3),)).module()
    state = State([module])
    module(torch.randn(4, 3) + 5)
    state.restore()
    assert dict(module.named_buffers())["running_mean"].tolist() == [0.0, 0.0, 0.0]


def test_a_buffer_that_was_written_from_the_graph_is_a_leaf_again():
    module, weight = nn.BatchNorm1d(3), torch.ones(3, requires_grad=True)
    state = State([module])
    module.running_mean.add_(weight)
    assert module.running_mean.grad_fn is not None
    state.restore()
    assert module.running_mean.grad_fn is None and module.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_a_gradient_that_was_there_is_put_back_though_backward_adds_to_it_in_place():
    weight = torch.ones(3, requires_grad=True)
    weight.sum().backward()
    gradient, state = weight.grad, State([weight])
    for _ in range(2):
        (2 * weight).sum().backward()
        assert weight.grad is gradient and gradient.tolist() == [3.0, 3.0, 3.0]
        state.restore()
        assert weight.grad is gradient and gradient.tolist() == [1.0, 1.0, 1.0]
