"""Inputs and outputs inside objects: batches of graph libraries, distributions, tuples with a class of their own."""

import dataclasses
import weakref
from collections import deque
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gradctl.subject.tree import leaves, map_leaves
from tests.judged import assert_passes, codes, finding, judge, wrong_tensors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient * ctx.saved_tensors[0].cos(), None


class Plain:
    def __init__(self, t: Tensor) -> None:
        self.t, self.note = t, "kept"


class Slotted:
    __slots__ = ("t", "unset")

    def __init__(self, t: Tensor) -> None:
        self.t = t


class Store:
    def __init__(self, parent: "Stored", fields: dict[str, Tensor]) -> None:
        self._mapping, self._parent = fields, weakref.ref(parent)


class Stored:
    """An object like PyG's Data: fields in a store, which refers to its owner."""

    def __init__(self, t: Tensor) -> None:
        self.__dict__["_store"] = Store(self, {"t": t})

    def __getattr__(self, name: str) -> Tensor:
        if name == "_store":
            raise RuntimeError("half made")
        return self._store._mapping[name]


class Refusing:
    """An object whose properties raise."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    @property
    def broken(self) -> None:
        raise ValueError("do not read")

    def __getattr__(self, name: str) -> None:
        raise ValueError(f"no {name}")


class Cyclic:
    def __init__(self, t: Tensor) -> None:
        self.t, self.me = t, self


class Pair(tuple):
    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))

    @property
    def t(self) -> Tensor:
        return self[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    t: Tensor


class Registered:
    __slots__ = ("hidden",)

    def __init__(self, t: Tensor) -> None:
        self.hidden = {"inner": (t,)}

    @property
    def t(self) -> Tensor:
        return self.hidden["inner"][0]


_pytree.register_pytree_node(Registered, lambda each: ([each.t], None), lambda parts, _: Registered(*parts))


KINDS = {
    "object": (Plain, "t"),
    "slots": (Slotted, "t"),
    "store": (Stored, "t"),
    "refusing": (Refusing, "t"),
    "cyclic": (Cyclic, "t"),
    "tuple subclass": (lambda t: Pair(t, 3), "0"),
    "frozen dataclass": (Frozen, "t"),
    "registered": (Registered, "0"),
}


class Given(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, batch):
        return Sine.apply(batch.t, self.factor)


class Giving(nn.Module):
    def __init__(self, factor: float, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.factor, self.make = nn.Linear(5, 3), nn.Linear(5, 3), factor, make

    def forward(self, x: Tensor):
        return self.a(x), self.make(Sine.apply(self.b(x), self.factor))


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_inside_is_a_leaf_by_its_path(kind):
    make, path = KINDS[kind]
    batch = make(X.clone())
    assert wrong_tensors(judge(Given(2.0), batch)) == [f"input:batch.{path}"]
    unit = judge(Given(1.0), batch)
    assert_passes(unit)
    assert [row.tensor for row in unit.tensors] == [f"input:batch.{path}"]
    assert torch.equal(batch.t, X) and not batch.t.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_inside_is_judged(kind):
    make, _ = KINDS[kind]
    assert {"param:b.weight", "param:b.bias"} <= set(wrong_tensors(judge(Giving(2.0, make), X)))
    assert_passes(judge(Giving(1.0, make), X))


def test_a_distribution_is_opened_as_input_and_output():
    normal = torch.distributions.Independent(torch.distributions.Normal(X.clone(), X.abs() + 0.5), 1)
    unit = judge(lambda prior, x: prior.log_prob(x), normal, X + 0.3)
    assert_passes(unit)
    names = {"input:prior.base_dist.loc", "input:prior.base_dist.scale", "input:x"}
    assert {row.tensor for row in unit.tensors} == names
    head = nn.Linear(5, 2)
    assert_passes(judge(lambda x: torch.distributions.Normal(head(x), head(x).exp()), X))


def test_a_module_given_as_input_has_leaves_of_its_own():
    decoder = nn.Linear(5, 2)
    unit = judge(lambda x, decoder: decoder(x).sin(), X, decoder)
    assert_passes(unit)
    assert {"param:decoder.weight", "param:decoder.bias", "input:x"} == {row.tensor for row in unit.tensors}


def test_what_stays_closed_is_named():
    unit = judge(lambda xs, y: next(iter(xs)).sin() + y, {X}, X)
    assert_passes(unit)
    assert finding(unit, "GC421").message.startswith(
        "input:xs is of type 'set', which cannot be opened: the tensors in"
    )
    assert "GC421" in codes(judge(lambda x: (x.sin(), {x.cos()}), X))


def test_a_global_that_a_method_reads_is_named_and_its_gradient_left_alone():
    SCALE.grad = None
    unit = judge(ReadsAGlobal(), X)
    assert_passes(unit)
    message = finding(unit, "GC421").message
    assert message.startswith("a tensor float32[5] requires a gradient and is not checked") and SCALE.grad is None


SCALE = torch.ones(5, requires_grad=True)


class ReadsAGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * SCALE).sin()


@pytest.mark.parametrize(
    "make",
    [*(make for make, _ in KINDS.values()), lambda t: deque([t]), lambda t: MappingProxyType({"t": t})],
    ids=[*KINDS, "deque", "read-only mapping"],
)
def test_a_rebuilt_object_has_its_class_and_new_leaves(make):
    value = make(X)
    rebuilt = map_leaves(lambda _, leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf, value)
    assert type(rebuilt) is type(value) and rebuilt is not value
    ((path, leaf),) = [each for each in leaves(rebuilt) if isinstance(each[1], Tensor)]
    assert torch.equal(leaf, X + 1) and [path] == [path for path, each in leaves(value) if isinstance(each, Tensor)]


def test_a_part_of_a_rebuilt_object_refers_to_the_rebuilt_one():
    rebuilt = map_leaves(lambda _, leaf: leaf, Stored(X))
    assert rebuilt._store._parent() is rebuilt
    cyclic = map_leaves(lambda _, leaf: leaf, Cyclic(X))
    assert cyclic.me is cyclic
