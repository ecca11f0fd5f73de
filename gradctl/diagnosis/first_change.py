"""Where a pass went wrong: the first value that both graphs have and do not agree on, and the fewest nodes for it.

Values are matched by name, in the order of the graph before the pass. Then the nodes above that value are cut out with
the values that they took, the pass is run on that part alone, and the part is made smaller as long as the pass still
gets it wrong (delta debugging: Zeller and Hildebrandt, IEEE TSE 28 (2002) 183). Where the node that makes the value is
as it was but for a constant that it takes, the constant is what changed first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from torch import Tensor

from gradctl.comparison.difference import FileDifference, tensor_difference
from gradctl.comparison.divergence import VALUES_A_RUN, compare_graphs, differing_values, with_outputs
from gradctl.comparison.trials import FileTrial
from gradctl.comparison.verified_graph import store
from gradctl.core.errors import TargetError
from gradctl.numerics.agreement import largest_scale
from gradctl.onnxio.onnx_file import OnnxFile, initializers, session
from gradctl.onnxio.session import run
from gradctl.onnxio.submodel import extract, select_outputs, values_used_by

_SECONDS = 10.0
_MOST_ELEMENTS_NAMED = 8
_Apply = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True, slots=True)
class FirstChange:
    """What a pass changed first.

    Attributes:
        value: its name; ``initializer b`` for a constant.
        node: the operator that makes it, or takes the constant, and the node's name.
        difference: how far it is off.
        nodes: the operators of the fewest nodes that show it; none where only the whole graph does.
        total: the nodes of the graph.
    """

    value: str
    node: str
    difference: FileDifference
    nodes: tuple[str, ...]
    total: int

    @property
    def change(self) -> str:
        """Return what is other: shape or dtype, a few whole numbers as they are, or else how far it is off."""
        before, after = self.difference.reference, self.difference.candidate
        assert before is not None and after is not None
        if self.difference.structure:
            return self.difference.structure
        is_constant = self.value != self.difference.name
        if not before.is_floating_point() and is_constant and before.numel() <= _MOST_ELEMENTS_NAMED:
            return f"{after.tolist()} instead of {before.tolist()}"
        return f"off by {self.difference.error:.2e}"


def first_change(before: OnnxFile, after: OnnxFile, apply: _Apply, trial: FileTrial, seed: int) -> FirstChange | None:
    """Return the first value that differs; None where only outputs of the graph do, which no node of both makes.

    Args:
        before: the graph before the pass, in a file; others are written beside it.
        after: and after.
        apply: the pass.
        trial: the inputs on which outputs differ.
        seed: of the noise.
    """
    makers = {name: place for place, node in enumerate(before.model.graph.node) for name in node.output}
    end = time.perf_counter() + _SECONDS
    inner: FirstChange | None = None
    for row in _differing(before, after, trial, seed):
        if row.structure and time.perf_counter() > end:
            inner = inner or _found(before, after, row, makers, set())
            continue
        shrinking = _Shrinking(before, apply, row.name, trial.feeds, seed=seed, end=end if row.structure else None)
        nodes = shrinking.smallest(makers[row.name], makers)
        found = _found(before, after, row, makers, nodes)
        # A pass may keep an inner value in another type or layout, and be right about it, but not one that a part of
        # the graph has as its output.
        if not row.structure or nodes or found.value != row.name:
            return found
        inner = inner or found
    return inner


def _found(
    before: OnnxFile, after: OnnxFile, row: FileDifference, makers: Mapping[str, int], nodes: Collection[int]
) -> FirstChange:
    node = before.model.graph.node[makers[row.name]]
    constant = _changed_constant(before, after, node, row)
    return FirstChange(
        f"initializer {constant.name}" if constant else row.name,
        f"{node.op_type} {node.name!r}" if node.name else node.op_type,
        constant or row,
        tuple(before.model.graph.node[each].op_type for each in sorted(nodes)),
        len(before.model.graph.node),
    )


def _changed_constant(
    before: OnnxFile, after: OnnxFile, node: onnx.NodeProto, row: FileDifference
) -> FileDifference | None:
    """Return the first constant of a node that is another now, where the node after takes all the same names."""
    twin = next((each for each in after.model.graph.node if row.name in each.output), None)
    if twin is None or (twin.op_type, list(twin.input)) != (node.op_type, list(node.input)):
        return None
    expected, given = (
        {name: tensor for name, tensor in initializers(each) if name in node.input} for each in (before, after)
    )
    shared = [name for name in node.input if name in expected and name in given]
    neighbours = largest_scale(expected[name] for name in shared)
    pairs = ((name, (expected[name], given[name])) for name in shared)
    found = (
        tensor_difference(name, *pair, oracle=None, neighbours=neighbours, trial=row.trial) for name, pair in pairs
    )
    return next((each for each in found if each.differs), None)


def _differing(before: OnnxFile, after: OnnxFile, trial: FileTrial, seed: int) -> Iterator[FileDifference]:
    """Give the values that differ, in the order of the graph before, a few a run."""
    # What a pass computed ahead of time is an initializer now.
    kept = {name for node in after.model.graph.node for name in node.output}
    kept |= {each.name for each in after.model.graph.initializer}
    shared = [name for node in before.model.graph.node for name in node.output if name and name in kept]
    values = [(name, name) for name in shared]
    return differing_values((before, after), values, (trial.name, trial.feeds), seed)


class _Shrinking:
    """The search for the fewest nodes on which the pass is still wrong."""

    def __init__(
        self,
        before: OnnxFile,
        apply: _Apply,
        value: str,
        feeds: Mapping[str, Tensor],
        *,
        seed: int,
        end: float | None,
    ) -> None:
        self.before, self.apply, self.value, self.seed = before, apply, value, seed
        self.values: dict[str, Tensor] = dict(feeds)
        self.end = end if end is not None else time.perf_counter() + _SECONDS

    def smallest(self, place: int, makers: Mapping[str, int]) -> set[int]:
        """Return the places of the nodes; none where no part of the graph shows it."""
        above = self._above(place, makers)
        self._fill([name for each in above for name in self.before.model.graph.node[each].output if name])
        size = 1
        while not self._is_wrong(above[:size]):
            if size >= len(above) or time.perf_counter() > self.end:
                return set()
            size *= 2
        return self._reduced(above[:size])

    def _reduced(self, chosen: list[int]) -> set[int]:
        """Return what is left when no node can go; the farthest is tried first, in halves, quarters and so on."""
        size = max(1, len(chosen) // 2)
        while True:
            start = len(chosen)
            while start > 1 and time.perf_counter() < self.end:
                start = max(1, start - size)
                without = chosen[:start] + chosen[start + size :]
                if self._is_wrong(without):
                    chosen = without
            if size == 1 or time.perf_counter() > self.end:
                return set(chosen)
            size //= 2

    def _above(self, place: int, makers: Mapping[str, int]) -> list[int]:
        """Return a node and all nodes that it depends on, the nearest first."""
        found = {place: None}
        for each in (queue := [place]):
            for name in values_used_by(self.before.model.graph.node[each]):
                if name in makers and makers[name] not in found:
                    found[makers[name]] = None
                    queue.append(makers[name])
        return list(found)

    def _fill(self, names: Sequence[str]) -> None:
        feeds = dict(self.values)
        for start in range(0, len(names), VALUES_A_RUN):
            few = names[start : start + VALUES_A_RUN]
            try:
                self.values |= run(session(with_outputs(self.before, few), optimised=False), feeds)
            except (RuntimeError, TargetError):  # a value that is no tensor cannot be the input of a part
                continue

    def _is_wrong(self, chosen: Collection[int]) -> bool:
        values = {name: value.numpy() for name, value in self.values.items()}
        smaller = extract(self.before.model, set(chosen), self.value, values)
        if smaller is None:
            return False
        try:
            left = store(smaller, self.before.path.with_name("part.onnx"))
            # Its output without a type: onnxruntime loads none that has another than it says.
            after = select_outputs(self.apply(smaller), [self.value])
            right = store(after, self.before.path.with_name("part-after.onnx"))
            feeds = {each.name: self.values[each.name] for each in left.inputs}
            found = compare_graphs(left, right, ("part", feeds), self.seed)
        except Exception:  # a pass may raise anything on a part
            return False
        return any(each.differs and not each.is_unstable and not each.is_missing for each in found.values())
