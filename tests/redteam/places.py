"""Where an operation can stand: contexts, regimes, layouts, sizes, dtypes, and what hides a wrong gradient.

A place is a function of ``make``, which makes the operation (with or without a bug, always with the same weights), and
returns a model and its inputs. It draws from the global generator, which is seeded before.
"""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.redteam.functions import FORMULAS, WIDTH, Formula, bugs_of

__all__ = ["PLACES", "Place"]

Make = Callable[..., Any]
Built = tuple[Callable[..., Any], tuple[Any, ...]]
BATCH = 5


@dataclass(frozen=True)
class Place:
    """``build`` puts an operation somewhere; ``kind`` groups places in a table of rates.

    ``bugs`` are those that show there, all that show anywhere if empty; ``fits`` tells the formulas that can stand
    there. ``is_hidden``: at this point no gradient of the model is changed by the bug.
    """

    kind: str
    build: Callable[[Make], Built]
    bugs: tuple[str, ...] = ()
    fits: Callable[[Formula], bool] = lambda formula: True
    is_hidden: bool = False

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the formulas and bugs that can stand here."""
        for name, formula in FORMULAS.items():
            for bug in bugs_of(formula) if self.fits(formula) else ():
                if not self.bugs:
                    yield name, bug
            if self.fits(formula):
                yield from ((name, bug) for bug in self.bugs)


PLACES: dict[str, Place] = {}


def place(kind: str, name: str = "", **more: Any) -> Callable[[Callable[[Make], Built]], Callable[[Make], Built]]:
    def add(build: Callable[[Make], Built]) -> Callable[[Make], Built]:
        PLACES[name or build.__name__] = Place(kind, build, **more)
        return build

    return add


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH,)), WIDTH)


def rectangular(formula: Formula) -> bool:
    return not formula.is_rectangular


class Around(nn.Module):
    """A linear layer, ``around(self, h)`` in which ``self.op`` is called, and another linear layer."""

    def __init__(self, op: Any, around: Callable[[Any, Tensor], Any], **children: Any) -> None:
        super().__init__()
        self.before, self.op, self.after = nn.Linear(WIDTH, WIDTH), op, nn.Linear(WIDTH, WIDTH)
        self.around = around
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        h = self.around(self, self.before(x))
        return self.after(h) if isinstance(h, Tensor) and h.shape[-1:] == (WIDTH,) else h


def gate(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def around(kind: str, name: str, function: Callable[[Any, Tensor], Any], children: Any = dict, **more: Any) -> None:
    """Add a place that is an expression of ``self`` and ``h`` between two linear layers."""
    PLACES[name] = Place(kind, lambda make: (Around(make(), function, **children()), (batch(),)), **more)


# ---- contexts: how the program is written ----

around("context", "plain", lambda m, h: m.op(h))
around("context", "residual branch", lambda m, h: h + m.op(h))
around("context", "small residual branch", lambda m, h: h + 1e-3 * m.op(h))
around("context", "residual, cotangent shared", lambda m, h: h + m.op(h), bugs=("writes to its cotangent",))
around("context", "twice in a row", lambda m, h: m.op(m.op(h).tanh()))
around("context", "two branches", lambda m, h: m.op(h) * m.op(h.flip(0)))
around("context", "loop", lambda m, h: _loop(m.op, h, 4))
around("context", "long loop", lambda m, h: _loop(m.op, h, 12))
around(
    "context",
    "loop, one cache for all calls",
    lambda m, h: _loop(m.op, h, 3),
    bugs=("uses the last call's input",),
    fits=lambda formula: formula is not FORMULAS["shift"],
)
around(
    "context",
    "two branches, one cache",
    lambda m, h: m.op(h) * m.op(h.flip(0)).sigmoid(),
    bugs=("uses the last call's input",),
    fits=lambda formula: formula is not FORMULAS["shift"],
)
around("context", "several outputs", lambda m, h: (m.op(h), {"sum": h.sum(), "others": [h.tanh()]}))
around("context", "an output that is not used", lambda m, h: m.op(h).chunk(2, -1)[0])
around("context", "inside no_grad and outside", lambda m, h: m.op(h) * _without_grad(m.op, h))
around("context", "hook that returns nothing", lambda m, h: _hooked(m.op(h), lambda g: None))
around("context", "hook that returns its argument", lambda m, h: _hooked(m.op(h), lambda g: g))
around("context", "retained gradient", lambda m, h: _retained(m.op(h)))
around("context", "functional_call", lambda m, h: torch.func.functional_call(m.op, dict(m.op.named_parameters()), h))
around(
    "context",
    "generator expression",
    lambda m, h: sum(m.op(row[None]) for row in h).sum(0, keepdim=True) + h,
    fits=rectangular,
)
around("context", "einsum around", lambda m, h: torch.einsum("bi,bj->bj", h.sigmoid(), m.op(h)))


def _loop(op: Any, h: Tensor, times: int) -> Tensor:
    for _ in range(times):
        h = 0.5 * h + 0.5 * op(h).tanh()
    return h


def _without_grad(op: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return op(h).sigmoid()


def _hooked(h: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    if h.requires_grad:
        h.register_hook(hook)
    return h.tanh()


def _retained(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.retain_grad()
    return h.tanh()


@place("context")
def first_and_nothing_before(make: Make) -> Built:
    return nn.Sequential(make(), nn.Linear(WIDTH, 3)), (batch(),)


@place("context")
def last_and_nothing_after(make: Make) -> Built:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make()), (batch(),)


@place("context")
def alone(make: Make) -> Built:
    return make(), (batch(),)


@place("context")
def deep_in_submodules(make: Make) -> Built:
    inner = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ModuleDict({"op": make()})["op"]), nn.Tanh())
    return nn.Sequential(inner, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())), (batch(),)


@place("context")
def shared_by_a_sequential(make: Make) -> Built:
    op = make()
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), op, nn.Tanh(), op, nn.Linear(WIDTH, 2)), (batch(),)


@place("context")
def forward_hook_with_a_closure(make: Make) -> Built:
    model = Around(make(), lambda m, h: h.tanh())
    model.before.register_forward_hook(lambda module, args, h: model.op(h))
    return model, (batch(),)


@place("context")
def patched_forward(make: Make) -> Built:
    model = Around(make(), lambda m, h: h.tanh())
    original = model.before.forward
    model.before.forward = lambda x: model.op(original(x))  # type: ignore[method-assign]
    return model, (batch(),)


@place("context")
def full_backward_hook(make: Make) -> Built:
    model = Around(make(), lambda m, h: m.op(h))
    model.after.register_full_backward_hook(lambda module, inputs, outputs: None)
    return model, (batch(),)


@place("context")
def function_of_tensors(make: Make) -> Built:
    op, weight = make(), torch.randn(WIDTH, WIDTH)
    return lambda x, w: (op(x @ w) * x).sum(-1), (batch(), weight)


@place("context")
def keyword_only_and_defaults(make: Make) -> Built:
    class Net(Around):
        def forward(self, x: Tensor, scale: float = 2.0, *, flip: bool = True) -> Any:
            return super().forward(scale * (x.flip(0) if flip else x))

    return Net(make(), lambda m, h: m.op(h)), (batch(),)


@place("context")
def parameters_in_a_list(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, WIDTH)]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Net(), (batch(),)


@place("context")
def weights_that_are_plain_tensors(make: Make) -> Built:
    model = Around(make(), lambda m, h: m.op(h) * m.scale)
    model.scale = torch.rand(WIDTH).add(1).requires_grad_()
    return model, (batch(),)


@place("context")
def module_of_length_zero(make: Make) -> Built:
    class Net(Around):
        def __len__(self) -> int:
            return 0

    return Net(make(), lambda m, h: m.op(h)), (batch(),)


@place("context")
def compiled_wrapper(make: Make) -> Built:
    return torch.compile(Around(make(), lambda m, h: m.op(h)), backend="eager"), (batch(),)


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Sample:
    values: Tensor
    weight: Tensor


class Bag:
    """What keeps its tensors as attributes, as PyG's Data does."""

    def __init__(self, values: Tensor, weight: Tensor) -> None:
        self.values, self.weight = values, weight


def _of_container(
    name: str, container: Callable[[Tensor, Tensor], Any], read: Callable[[Any], tuple[Any, Any]]
) -> None:
    class Net(nn.Module):
        def __init__(self, op: Any) -> None:
            super().__init__()
            self.op = op

        def forward(self, given: Any) -> Tensor:
            values, weight = read(given)
            return self.op(values * weight).sum(-1)

    PLACES[name] = Place("context", lambda make: (Net(make()), (container(batch(), torch.rand(WIDTH) + 1),)))


_of_container("dataclass as input", Sample, lambda given: (given.values, given.weight))
_of_container("object as input", Bag, lambda given: (given.values, given.weight))
_of_container("named tuple as input", Pair, lambda given: (given.left, given.right))
_of_container("dict as input", lambda a, b: {"a": a, "b": [b]}, lambda given: (given["a"], given["b"][0]))


@place("context")
def object_as_output(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.op = nn.Linear(WIDTH, WIDTH), make()

        def forward(self, x: Tensor) -> Bag:
            h = self.layer(x)
            return Bag(self.op(h), h.mean())

    return Net(), (batch(),)


@place("context")
def tied_weights(make: Make) -> Built:
    model = Around(make(), lambda m, h: m.op(h))
    model.after.weight = model.before.weight
    return model, (batch(),)


@place("context")
def inside_a_recurrent_cell(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.op = nn.GRUCell(WIDTH, WIDTH), make()

        def forward(self, xs: Tensor) -> Tensor:
            h = xs.new_zeros(xs.shape[1], WIDTH)
            for x in xs:
                h = self.op(self.cell(x, h))
            return h

    return Net(), (batch(4, 3),)


@place("context", fits=rectangular)
def inside_attention(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.op = nn.Linear(WIDTH, 3 * WIDTH), make()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, self.op(v), is_causal=True)

    return Net(), (batch(2, 4),)


@place("context")
def after_an_embedding(make: Make) -> Built:
    return nn.Sequential(nn.Embedding(7, WIDTH), make(), nn.Linear(WIDTH, 2)), (torch.randint(7, (BATCH,)),)


@place("context")
def before_a_spectral_norm(make: Make) -> Built:
    last = parametrizations.spectral_norm(nn.Linear(WIDTH, 3))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), last), (batch(),)


@place("context")
def before_a_weight_norm(make: Make) -> Built:
    last = parametrizations.weight_norm(nn.Linear(WIDTH, 3))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), last), (batch(),)


def _written(name: str, style: str, function: Callable[[Any, Tensor], Any], **more: Any) -> None:
    """Add a place for a Function that is written in another style."""
    PLACES[name] = Place("context", lambda make: (Around(make(style=style), function), (batch(),)), **more)


# These see one row at a time, without an axis of the batch.
_BY_ROW = {
    "fits": rectangular,
    "bugs": ("x times 1.1", "x times 2", "x times 0", "x times -1", "forgets the cotangent"),
}
_SMOOTH = ("leaky", "clamp", "maximum")
_written("kept in attributes", "kept in attributes", lambda m, h: m.op(h))
_written("kept in attributes, twice", "kept in attributes", lambda m, h: m.op(h).tanh() + m.op(h.flip(0)))
_written("several outputs of a Function", "several outputs", lambda m, h: m.op(h))
_written(
    "several outputs of a Function, checkpointed",
    "several outputs",
    lambda m, h: checkpoint(m.op, h, use_reentrant=False),
)
_written("setup_context", "transformed", lambda m, h: m.op(h))
_written("vmap over rows", "transformed", lambda m, h: torch.func.vmap(m.op)(h), **_BY_ROW)
_written("func.grad beside", "transformed", lambda m, h: torch.func.grad(lambda h: m.op(h).square().sum())(h) + m.op(h),
         fits=lambda formula: formula not in [FORMULAS[name] for name in _SMOOTH])  # fmt: skip
_written("func.vjp in forward", "transformed", lambda m, h: torch.func.vjp(m.op, h)[0])
_written("func.functional_call and vmap", "transformed", lambda m, h: torch.func.vmap(
    lambda row: torch.func.functional_call(m.op, dict(m.op.named_parameters()), row))(h), **_BY_ROW)  # fmt: skip


# ---- regimes: how it is trained ----

around("regime", "checkpoint", lambda m, h: checkpoint(m.op, h, use_reentrant=False))
around("regime", "reentrant checkpoint", lambda m, h: checkpoint(m.op, h, use_reentrant=True))
around(
    "regime", "checkpoint of several layers", lambda m, h: checkpoint(lambda h: m.op(h).tanh(), h, use_reentrant=False)
)
around("regime", "detached on purpose", lambda m, h: h.detach() * m.op(h))
around("regime", "straight through by detach", lambda m, h: m.op(h) + (h.round() - h).detach())
around("regime", "statistics without gradient", lambda m, h: m.op(h) / _std(h))
around("regime", "in place after", lambda m, h: m.op(h).mul_(2).add_(h))
around("regime", "relu in place after", lambda m, h: m.op(h).clone().relu_())
around("regime", "in place on a view", lambda m, h: _assigned(m.op(h), h))
around("regime", "dropout before", lambda m, h: m.op(F.dropout(h, 0.3, m.training)))
around("regime", "dropout after, in eval", lambda m, h: m.drop(m.op(h)), lambda: {"drop": nn.Dropout(0.5).eval()})
around("regime", "batch norm before", lambda m, h: m.op(m.norm(h)), lambda: {"norm": nn.BatchNorm1d(WIDTH)})
around("regime", "batch norm in eval", lambda m, h: m.norm(m.op(h)), lambda: {"norm": nn.BatchNorm1d(WIDTH).eval()})
around("regime", "noise", lambda m, h: m.op(h + 0.1 * torch.randn_like(h)))
around(
    "regime",
    "exponential moving average",
    lambda m, h: m.op(h) - _moved(m.mean, h),
    lambda: {"mean": nn.Buffer(torch.zeros(WIDTH))},
)


def _std(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.std() + 1


def _assigned(value: Tensor, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1:] = value[:, 1:]
    return h


def _moved(mean: Tensor, h: Tensor) -> Tensor:
    mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return mean.clone()


@place("regime")
def frozen_before(make: Make) -> Built:
    model = Around(make(), lambda m, h: m.op(h))
    model.before.requires_grad_(False)
    return model, (batch(),)


@place("regime", bugs=tuple(f"x times {f}" for f in ("1.01", "-1", "0")))
def frozen_operation(make: Make) -> Built:
    return Around(make().requires_grad_(False), lambda m, h: m.op(h)), (batch(),)


@place("regime")
def momentum_encoder(make: Make) -> Built:
    model = Around(make(), lambda m, h: m.op(h) * m.target(h).detach())
    model.target = copy.deepcopy(model.after).requires_grad_(False)
    return model, (batch(),)


@place("regime", fits=lambda formula: formula not in (FORMULAS["leaky"], FORMULAS["clamp"], FORMULAS["maximum"]))
def energy_and_forces(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.op = nn.Linear(WIDTH, WIDTH), make()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x if x.requires_grad else x.clone().requires_grad_()
            energy = self.op(self.layer(x)).square().sum(-1)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return energy, force

    return Net(), (batch(),)


@place("regime")
def gradient_penalty_beside(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic, self.op = nn.Linear(WIDTH, 1), make()

        def forward(self, x: Tensor) -> Tensor:
            between = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.critic(between).tanh().sum(), between, create_graph=True)
            return self.op(x).mean() + (gradient.norm(dim=-1) - 1).square().mean()

    return Net(), (batch(),)


@place("regime")
def lazily_built(make: Make) -> Built:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.LazyLinear(3)), (batch(),)


# ---- layouts, sizes ----


def _given(kind: str, name: str, x: Callable[[], Tensor], **more: Any) -> None:
    def build(make: Make) -> Built:
        return nn.Sequential(make(), nn.Linear(WIDTH, 3)), (x(),)

    PLACES[name] = Place(kind, build, **more)


_given("layout", "transposed input", lambda: torch.randn(WIDTH, BATCH).t())
_given("layout", "strided input", lambda: torch.randn(BATCH, 2 * WIDTH)[:, ::2])
_given("layout", "input with an offset", lambda: torch.randn(BATCH + 2, WIDTH)[2:])
_given("layout", "expanded input", lambda: torch.randn(1, WIDTH).expand(BATCH, WIDTH))
_given("layout", "overlapping input", lambda: torch.randn(BATCH + WIDTH).unfold(0, WIDTH, 1))
_given("size", "one row", lambda: batch(1))
_given("size", "three axes", lambda: batch(2, 3), fits=rectangular)
_given("size", "axes of size one", lambda: batch(1, 3, 1), fits=rectangular)
_given("size", "one axis", lambda: torch.randn(WIDTH), fits=rectangular)
_given(
    "size",
    "1e5 elements",
    lambda: batch(20_000),
    fits=rectangular,
    bugs=("x times 1.01", "x misses the last column", "x is None", "x times -1", "takes the sign"),
)
around("layout", "transposed before", lambda m, h: m.op(h.view(WIDTH, BATCH).t()))
around("layout", "transposed after", lambda m, h: m.op(h).t().reshape(BATCH, WIDTH))
around("layout", "expanded after", lambda m, h: m.op(h)[None].expand(3, BATCH, WIDTH).tanh())
around("layout", "summed", lambda m, h: m.op(h).sum())
around("layout", "mean over rows", lambda m, h: m.op(h).mean(0))
around("layout", "gathered", lambda m, h: m.op(h)[torch.tensor([0, 0, 3])])
around("layout", "scattered", lambda m, h: torch.zeros(3, WIDTH).index_add(0, torch.tensor([0, 0, 1, 2, 2]), m.op(h)))
around(
    "layout",
    "summed, memory read",
    lambda m, h: m.op(h).t().contiguous().tanh(),
    bugs=("reads its cotangent's memory",),
)
around("layout", "permuted and split", lambda m, h: torch.cat(m.op(h).t().split([2, 4])[::-1]).t())


@place("layout", fits=rectangular)
def channels_last(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.op = nn.Conv2d(3, WIDTH, 3, padding=1), make()

        def forward(self, image: Tensor) -> Tensor:
            h = self.conv(image)
            return self.op(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).mean((2, 3))

    return Net(), (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),)


@place("size", bugs=("x times 1.1", "x times 2", "x times -1", "x times 0", "x is None", "takes the sign"),
       fits=lambda formula: formula.is_elementwise)  # fmt: skip
def scalar_loss(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.op = nn.Linear(WIDTH, 1), make()

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.layer(x).square().mean())

    return Net(), (batch(),)


# ---- dtypes ----


@place("dtype")
def float64(make: Make) -> Built:
    return Around(make(torch.float64), lambda m, h: m.op(h)).double(), (batch().double(),)


@place("dtype", bugs=("x times 1.1", "x times 2", "x times -1", "w times 0", "x misses the last column", "w is None"),
       fits=lambda formula: bool(formula.weights))  # fmt: skip
def bfloat16(make: Make) -> Built:
    return Around(make(), lambda m, h: m.op(h)).bfloat16(), (batch().bfloat16(),)


@place("dtype")
def cast_inside(make: Make) -> Built:
    return Around(make(), lambda m, h: m.op(h.bfloat16().to(h.dtype))), (batch(),)


@place("dtype", bugs=("x times 1.01", "x times 2", "x times -1", "x times 0", "x is None", "x misses the last column"),
       fits=lambda formula: formula.takes_complex)  # fmt: skip
def complex64(make: Make) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.op = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64), make(torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(self.op(self.layer(x)))

    return Net(), (torch.randn(BATCH, WIDTH, dtype=torch.complex64),)


# ---- what hides a wrong gradient ----

around("hidden", "softmax after", lambda m, h: m.op(h).softmax(-1))
around("hidden", "layer norm after", lambda m, h: F.layer_norm(m.op(h), (WIDTH,)))
around("hidden", "batch norm after", lambda m, h: m.norm(m.op(h)), lambda: {"norm": nn.BatchNorm1d(WIDTH)})
around("hidden", "unit norm after", lambda m, h: F.normalize(m.op(h), dim=-1))
around("hidden", "times 1e-6", lambda m, h: 1e-6 * m.op(h))
around("hidden", "times 1e6", lambda m, h: 1e6 * m.op(h))
around("hidden", "small beside large", lambda m, h: torch.stack([1e6 * h.tanh(), m.op(h)]))
around("hidden", "large offset", lambda m, h: 1e4 + m.op(h))
around("hidden", "saturated sigmoid", lambda m, h: (m.op(h) + 12).sigmoid())
around("hidden", "masked with -1e9", lambda m, h: _masked(m.op(h), -1e9).softmax(-1))
around("hidden", "masked with finfo.min", lambda m, h: _masked(m.op(h), torch.finfo(h.dtype).min).softmax(-1))
around("hidden", "masked with -inf", lambda m, h: _masked(m.op(h), -torch.inf).softmax(-1))
around("hidden", "output masked with -1e9", lambda m, h: _masked(m.op(h), -1e9)[:, :5])
around("hidden", "output masked with finfo.min", lambda m, h: _masked(m.op(h), torch.finfo(h.dtype).min)[:, :5])
around("hidden", "mask added", lambda m, h: (m.op(h) + torch.tensor([0, 0, 0, -1e9, 0, -1e9])).log_softmax(-1)[:, :3])
around("hidden", "zero gate", lambda m, h: h + m.gate * m.op(h), lambda: {"gate": gate()}, is_hidden=True)
around(
    "hidden", "zero gate a channel", lambda m, h: h + m.gate * m.op(h), lambda: {"gate": gate(WIDTH)}, is_hidden=True
)
around("hidden", "zero layer after", lambda m, h: h + m.zero(m.op(h)), lambda: {"zero": _zero_layer()}, is_hidden=True)
around("hidden", "regulariser of 1e-6", lambda m, h: h.square().mean() + 1e-6 * m.op(h).square().mean())
around("hidden", "regulariser of 1e-9", lambda m, h: h.square().mean() + 1e-9 * m.op(h).square().mean())
around("hidden", "regulariser of 1e-13", lambda m, h: h.square().mean() + 1e-13 * m.op(h).square().mean())
around("hidden", "beside relu at 0", lambda m, h: m.op(h) + m.zero(h).relu(), lambda: {"zero": _zero_layer()})
around("hidden", "beside ties in max", lambda m, h: m.op(h) + torch.stack([h, h]).amax(0))
around("hidden", "beside ties in a median", lambda m, h: m.op(h) + torch.cat([h, h]).median(0).values)
around(
    "hidden", "beside clamp at its bound", lambda m, h: m.op(h) + m.zero(h).clamp(0, 1), lambda: {"zero": _zero_layer()}
)
around("hidden", "sorted after", lambda m, h: m.op(h).sort(-1).values)
around("hidden", "largest three", lambda m, h: m.op(h).topk(3, -1).values)
around("hidden", "quantile after", lambda m, h: m.op(h).quantile(0.3, -1))
around("hidden", "max pooled after", lambda m, h: F.max_pool1d(m.op(h)[:, None], 2).flatten(1))
around("hidden", "cross-entropy", lambda m, h: F.cross_entropy(m.op(h), torch.tensor([0, 1, 2, 3, 5])))
around("hidden", "log near the edge", lambda m, h: (m.op(h).sigmoid() + 1e-8).log())
around(
    "hidden",
    "straight line in front",
    lambda m, h: m.op(0 * h + m.bias),
    lambda: {"bias": nn.Parameter(torch.rand(WIDTH))},
)


def _masked(h: Tensor, value: float) -> Tensor:
    return h.masked_fill(torch.tensor([False, False, False, True, False, True]), value)


def _zero_layer() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@place(
    "hidden", bugs=("is wrong at zero",), fits=lambda formula: formula not in (FORMULAS["quadratic"], FORMULAS["leaky"])
)
def input_with_zeros(make: Make) -> Built:
    x = batch()
    x[0, :3] = x[2, 1] = 0
    return nn.Sequential(make(), nn.Linear(WIDTH, 3)), (x,)


@place("hidden", bugs=("clips its cotangent",), is_hidden=True)
def only_large_cotangents(make: Make) -> Built:
    return Around(make(), lambda m, h: m.op(h)), (batch(),)


@place("hidden", bugs=("writes to its cotangent",), is_hidden=True)
def cotangent_of_nobody_else(make: Make) -> Built:
    return Around(make(), lambda m, h: m.op(h)), (batch(),)


@place("hidden", bugs=("reads its cotangent's memory",), is_hidden=True)
def cotangent_that_is_contiguous(make: Make) -> Built:
    return Around(make(), lambda m, h: m.op(h)), (batch(),)
