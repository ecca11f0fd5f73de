"""Does `gradctl gradcheck` name exactly the part whose backward is wrong, and what does that cost? 200 planted bugs.

    python -m tests.benchmarks.localisation [--bugs 200] [--seed 0]

A random leaf module of an MLP, a convolutional, an attention and a recurrent net gets a wrong backward: one of the
gradients that it returns (of its input or of a parameter of its own) is scaled by 1.1, negated, reversed in its rows,
or loses half of itself. Kinds: an ``autograd.Function`` or a ``torch.library.custom_op`` that stands for the leaf, and
torch operators alone (``scatter`` with an index that occurs twice). A bug counts where it moves the gradient of some
tensor of the model by 1e-3 at least, by autograd in float64 with and without it.

"Exactly": the findings place one part, with its module and its operator, and no other. The cost of localisation is the
time from the alarm on (Functions alone, the rest judged around them, calls alone), over that of the whole check of the
same net without the bug, both in this process.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.findings import Unit
from gradctl.gradients import gradcheck as checking
from gradctl.subject.subject import Subject
from tests.zoo import NATIVE_BUGS

BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale 1.1": lambda g: 1.1 * g,
    "sign": lambda g: -g,
    "rows swapped": lambda g: g.flip(0),
    "dropped term": lambda g: torch.cat([g[: len(g) // 2], torch.zeros_like(g[len(g) // 2 :])]),
}
NATIVE = ("scale 1.1", "sign", "rows swapped", "off by one", "zero")
KINDS = {"function": "WrongLeaf", "custom op": "gradctl_benchmark::leaf", "native": "torch.Tensor.scatter"}


class SelfAttention(nn.Module):
    """Attention of one head over [batch, time, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.softmax, self.norm = nn.Softmax(-1), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return self.norm(x + self.softmax(scores) @ self.value(x))


class Recurrent(nn.Module):
    """A GRU cell and an RNN cell over time, from [time, batch, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(width, width), nn.RNNCell(width, width)
        self.between, self.head = nn.Tanh(), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = second = torch.zeros_like(x[0])
        for step in x:
            first = self.first(step, first)
            second = self.second(self.between(first), second)
        return self.head(second)


def mlp() -> tuple[nn.Module, Tensor]:
    """Return an MLP with normalisation."""
    layers = [part for _ in range(3) for part in (nn.Linear(12, 12), nn.LayerNorm(12), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(12, 3)), torch.randn(5, 12)


def conv() -> tuple[nn.Module, Tensor]:
    """Return a small convolutional net with BatchNorm and pooling."""
    first = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*first, *second), torch.randn(3, 2, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    """Return two attention blocks and an MLP between them."""
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return nn.Sequential(SelfAttention(8), block, SelfAttention(8), nn.Linear(8, 3)), torch.randn(2, 5, 8)


def recurrent() -> tuple[nn.Module, Tensor]:
    """Return two cells over four steps."""
    return Recurrent(6), torch.randn(4, 3, 6)


NETS = {"mlp": mlp, "conv": conv, "attention": attention, "recurrent": recurrent}

# What the operator below stands for: leaf, names of its parameters, index of the spoiled gradient, bug.
_STANDING: dict[str, tuple[nn.Module, list[str], int, str]] = {}


def _forward(tensors: list[Tensor], key: str) -> Tensor:
    module, names, _, _ = _STANDING[key]
    inputs = tensors[: len(tensors) - len(names)]
    parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
    return torch.func.functional_call(module, parameters, tuple(inputs)).clone()


def _spoiled(tensors: list[Tensor], key: str, cotangent: Tensor) -> list[Tensor | None]:
    _, _, spoiled, bug = _STANDING[key]
    with torch.enable_grad():
        copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        found = list(torch.autograd.grad(_forward(copies, key), copies, cotangent, allow_unused=True))
    wrong = found[spoiled]
    found[spoiled] = BUGS[bug](wrong) if wrong is not None else None
    return found


class WrongLeaf(torch.autograd.Function):
    """A leaf module with one of its gradients spoiled."""

    @staticmethod
    def forward(ctx: Any, key: str, *tensors: Tensor) -> Tensor:
        ctx.key = key
        ctx.save_for_backward(*tensors)
        return _forward(list(tensors), key)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_spoiled(list(ctx.saved_tensors), ctx.key, cotangent)


@torch.library.custom_op("gradctl_benchmark::leaf", mutates_args=())
def _leaf(tensors: list[Tensor], key: str) -> Tensor:
    return _forward(tensors, key)


def _setup(ctx: Any, inputs: tuple[list[Tensor], str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])
    ctx.key = inputs[1]


_leaf.register_autograd(
    lambda ctx, cotangent: (_spoiled(list(ctx.saved_tensors), ctx.key, cotangent), None), setup_context=_setup
)


def overwritten(value: Tensor, bug: str) -> Tensor:
    """Return ``value`` with a wrong gradient, by torch operators: L(value) written first, and then value over it."""
    flat = value.reshape(-1)
    index = torch.arange(flat.numel()).repeat(2)
    return flat.scatter(0, index, torch.cat([NATIVE_BUGS[bug](value).reshape(-1), flat])).view_as(value)


def plant(model: nn.Module, path: str, kind: str, draw: random.Random) -> nn.Module:
    """Return a copy of the model whose leaf at ``path`` has a wrong backward of this kind."""
    model = copy.deepcopy(model)
    leaf = model.get_submodule(path)
    names = [name for name, _ in leaf.named_parameters()]
    original, key = copy.deepcopy(leaf), f"{len(_STANDING)}"
    if kind == "native":
        bug, spoiled = draw.choice(NATIVE), draw.choice(["output", *names])
        if spoiled == "output":
            changed: Any = {"forward": lambda self, *x: overwritten(type(self).__mro__[1].forward(self, *x), bug)}
        else:
            changed = {spoiled: property(lambda self: overwritten(self._parameters[spoiled], bug))}
    else:
        inputs = 2 if isinstance(leaf, nn.RNNCellBase) else 1
        _STANDING[key] = original, names, draw.randrange(inputs + len(names)), draw.choice(list(BUGS))

        def forward(self: nn.Module, *x: Tensor) -> Tensor:
            tensors = [*x, *(getattr(self, name) for name in names)]
            return WrongLeaf.apply(key, *tensors) if kind == "function" else _leaf(tensors, key)

        changed = {"forward": forward}
    leaf.__class__ = type(type(leaf).__name__, (type(leaf),), changed)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all gradients of one random cotangent in float64, one after another."""
    wide, x = copy.deepcopy(model).double(), x.double().clone().requires_grad_()
    torch.manual_seed(0)
    output = wide(x)
    output.backward(torch.randn_like(output))
    return [torch.zeros(1) if t.grad is None else t.grad for t in (*wide.parameters(), x)]


def shows(clean: nn.Module, planted: nn.Module, x: Tensor) -> bool:
    """Tell whether the bug moves a gradient by 1e-3 of its norm."""
    pairs = zip(gradients(clean, x), gradients(planted, x), strict=True)
    return any(float((right - wrong).norm()) > 1e-3 * float(right.norm()) > 1e-9 for right, wrong in pairs)


def named(unit: Unit) -> set[tuple[str | None, str | None]]:
    """Return module and operator of each part that the findings call wrong."""
    own = [each for each in unit.findings if each.code in ("GC401", "GC403") and each.cause is None]
    heads = [each for each in unit.findings if each.code == "GC408"]
    places = {each.location for each in (*heads, *own) if each.location is not None}
    unplaced = {(None, None) for each in own if each.location is None or each.location.op is None}
    return {(place.module, place.op) for place in places if place.op is not None} | unplaced


@contextmanager
def timed(spent: list[float]) -> Any:
    """Add what localisation takes to ``spent``."""

    def timing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return wrapper

    before = checking.FunctionCheck.judge_besides, checking.locate_wrong_backwards
    checking.FunctionCheck.judge_besides, checking.locate_wrong_backwards = map(timing, before)
    try:
        yield
    finally:
        checking.FunctionCheck.judge_besides, checking.locate_wrong_backwards = before


def check(model: nn.Module, x: Tensor) -> Unit:
    """Return gradcheck's unit."""
    return checking.gradcheck(Subject(target="net", model=model, args=(x,)))


def main() -> None:
    """Print a row a net and kind, and the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bugs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    cells = [(net, kind) for net in NETS for kind in KINDS]
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {options.bugs} planted bugs, seed {options.seed}")
    print(f"{'net':<10} {'kind':<10} {'bugs':>5} {'exactly':>8} {'check':>9} {'localised in':>13} {'ratio':>7}")
    exactly, ratios = 0, []
    torch.manual_seed(options.seed)
    warm_up, x = mlp()
    check(plant(warm_up, "0", "native", random.Random(0)), x)  # what torch imports on first use is no cost of a check
    for position, (net, kind) in enumerate(cells):
        count = len(range(position, options.bugs, len(cells)))
        good, plain, extra = 0, [], []
        for _ in range(count):
            model, x = NETS[net]()
            leaves = [name for name, part in model.named_modules() if not list(part.children())]
            while True:
                path = draw.choice(leaves)
                planted = plant(model, path, kind, draw)
                if shows(model, planted, x):
                    break
            start = time.perf_counter()
            clean = check(model, x)
            plain.append(time.perf_counter() - start)
            assert clean.verdict == "pass", f"{net}: the clean net is not silent"
            spent: list[float] = []
            with timed(spent):
                found = named(check(planted, x))
            extra.append(sum(spent))
            ratios.append(extra[-1] / plain[-1])
            if found == {(path, KINDS[kind])}:
                good += 1
            else:
                print(f"  {net}, {kind} in {path}: named {sorted(map(str, found))}")
        exactly += good
        print(
            f"{net:<10} {kind:<10} {count:>5} {good:>8} {statistics.median(plain):>7.2f} s "
            f"{statistics.median(extra):>11.2f} s {statistics.median(extra) / statistics.median(plain):>5.1f} x",
            flush=True,
        )
    share = 100 * exactly / options.bugs
    print(
        f"named exactly: {exactly} of {options.bugs} ({share:.1f} %); cost over the check itself: median "
        f"{statistics.median(ratios):.1f} x, largest {max(ratios):.1f} x"
    )


if __name__ == "__main__":
    main()
