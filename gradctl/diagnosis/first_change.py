"""The error of a pass: the first value that both graphs have and that differs, and the fewest nodes that show it.

Values are matched by name, in the order of the graph before the pass. Then the nodes above that value are extracted
with the values of their inputs, the pass is run on that part alone, and the part is made smaller as long as the pass is
still wrong (delta debugging: Zeller and Hildebrandt, IEEE TSE 28 (2002) 183). If only a constant input of the node that
computes the value differs, the constant is the first change.
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
    """The first value that a pass changed.

    Attributes:
        value: its name; ``initializer b`` for a constant.
        node: the operator that computes the value, or uses the constant, and the name of the node.
        difference: of the value.
        nodes: the operators of the fewest nodes that show it; empty if only the whole graph does.
        total: the number of nodes of the graph.
    """

    value: str
    node: str
    difference: FileDifference
    nodes: tuple[str, ...]
    total: int

    @property
    def change(self) -> str:
        """Return the difference in words: shape or dtype, a few integers, or the relative error."""
        before, after = self.difference.reference, self.difference.candidate
        assert before is not None and after is not None
        if self.difference.structure:
            return self.difference.structure
        is_constant = self.value != self.difference.name
        if not before.is_floating_point() and is_constant and before.numel() <= _MOST_ELEMENTS_NAMED:
            return f"{after.tolist()} instead of {before.tolist()}"
        return f"off by {self.difference.error:.2e}"


def first_change(before: OnnxFile, after: OnnxFile, apply: _Apply, trial: FileTrial, seed: int) -> FirstChange | None:
    """Return the first value that differs; None if only outputs of the graph do, which no node of both computes.

    Args:
        before: the graph before the pass, in a file; others are written beside it.
        after: the graph after the pass.
        apply: the pass.
        trial: the inputs on which outputs differ.
        seed: of the noise.
    """
    makers = {name: place for place, node in enumerate(before.model.graph.node) for name in node.output}
    end = time.perf_counter() + _SECONDS
    inner: FirstChange | None = None
    for row in _differing(before, after, trial, seed):
        is_late = bool(row.structure) and time.perf_counter() > end
        shrinking = _Shrinking(before, apply, row.name, trial.feeds, seed=seed, end=end if row.structure else None)
        found = _found(before, after, row, makers, set() if is_late else shrinking.smallest(makers))
        if not is_late and _is_a_change(row, found):
            return found
        inner = inner or found
    return inner


def _is_a_change(row: FileDifference, found: FirstChange) -> bool:
    """Return whether a value differs in its numbers, in a constant, or as the output of a part of the graph.

    A pass may keep an inner value in another type or layout, and be right about it.
    """
    return not row.structure or bool(found.nodes) or found.value != row.name


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
    """Return the first constant of a node that differs, if its operator and the names of its inputs are as before."""
    own, nodes = (node.op_type, node.input), after.model.graph.node
    if not any(row.name in each.output and (each.op_type, each.input) == own for each in nodes):
        return None
    expected, found = _constants(before, node), _constants(after, node)
    pairs = {name: (expected[name], found[name]) for name in node.input if name in expected.keys() & found.keys()}
    neighbours = largest_scale(reference for reference, _ in pairs.values())
    differences = (
        tensor_difference(name, *pair, oracle=None, neighbours=neighbours, trial=row.trial)
        for name, pair in pairs.items()
    )
    return next((each for each in differences if each.differs), None)


def _constants(file: OnnxFile, node: onnx.NodeProto) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in initializers(file) if name in node.input}


def _differing(before: OnnxFile, after: OnnxFile, trial: FileTrial, seed: int) -> Iterator[FileDifference]:
    """Yield the values that differ, in the order of the graph before, a few for each run."""
    # What a pass computed ahead of time is an initializer now.
    kept = {name for node in after.model.graph.node for name in node.output}
    kept |= {each.name for each in after.model.graph.initializer}
    shared = [name for node in before.model.graph.node for name in node.output if name and name in kept]
    values = [(name, name) for name in shared]
    return differing_values((before, after), values, (trial.name, trial.feeds), seed)


class _Shrinking:
    """The search for the fewest nodes on which the pass is still wrong."""

    def __init__(
        self, before: OnnxFile, apply: _Apply, value: str, feeds: Mapping[str, Tensor], *, seed: int, end: float | None
    ) -> None:
        self.before, self.apply, self.value, self.seed = before, apply, value, seed
        self.values: dict[str, Tensor] = dict(feeds)
        self.end = end if end is not None else time.perf_counter() + _SECONDS

    def smallest(self, makers: Mapping[str, int]) -> set[int]:
        """Return the places of the nodes; empty if no part of the graph shows the difference."""
        above = self._above(makers[self.value], makers)
        self._fill([name for each in above for name in self.before.model.graph.node[each].output if name])
        size = 1
        while not self._is_wrong(above[:size]):
            if size >= len(above) or time.perf_counter() > self.end:
                return set()
            size *= 2
        return self._reduced(above[:size])

    def _reduced(self, chosen: list[int]) -> set[int]:
        """Return nodes of which none can be left out; the farthest are tried first, in halves, quarters and so on."""
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
