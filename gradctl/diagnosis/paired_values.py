"""Values of eager and of a form, compared: the first divergence, forward and backward.

Values are paired if they are equal, whatever their names: a form may decompose an operator, reorder or fold, and its
intermediate values have no counterpart then. If several are equal (the two sides of a gradient reversal), they are
paired in their order; if their number differs, any counterpart will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradctl.forms.graph_value import GraphRun, GraphValue
from gradctl.numerics.sketch import Sketch
from gradctl.tracing.graph import CallSite
from gradctl.tracing.values import ProgramValue

# So much smaller than the largest, an adjoint is zero by cancellation (a bias before BatchNorm) but for rounding.
_CANCELLED = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """The first node of a form whose result, or whose gradient, is not eager's.

    Attributes:
        node: in the form.
        eager: the counterpart in eager; None if it has none.
        cut: the one of the two, ``eager`` or ``form``, in which no gradient passes; None if they agree.
        breaks: whether it computes NaN or infinities from finite values.
        instead: the call that eager makes there, if the node belongs to another module: something is left out.
        module: of the call that eager makes just before, for a form that does not know of modules.
    """

    node: GraphValue
    eager: ProgramValue | None = None
    cut: str | None = None
    breaks: bool = False
    instead: CallSite | None = None
    module: str | None = None


class PairedValues:
    """One run of eager and one of a form on the same inputs.

    Args:
        values: of eager's top-level calls, in order.
        inside: of what happens inside of those calls.
        run: of the form.
        tolerance: up to which relative distance two values are one.
    """

    def __init__(
        self, values: Sequence[ProgramValue], inside: Sequence[Sketch], run: GraphRun, tolerance: float
    ) -> None:
        self.run, self.tolerance = run, tolerance
        self._modules = {each.place.module for each in run.values if each.place is not None}
        self._by_name = {each.name: each for each in run.values}
        self._order = {each.name: number for number, each in enumerate(run.values)}
        self._users: dict[str, list[GraphValue]] = defaultdict(list)
        for each in run.values:
            for name in dict.fromkeys(each.inputs):
                self._users[name].append(each)
        self._inside: dict[tuple[int, ...], list[Sketch]] = defaultdict(list)
        for sketch in inside:
            self._inside[sketch.shape].append(sketch)
        self._floor = _CANCELLED * max((each.adjoint.norm for each in values if each.adjoint), default=0.0)
        self._counterparts = self._paired(values)

    def first_value(self) -> Divergence | None:
        """Return the first node before an output that differs, although all of its inputs are values of eager.

        If the form computes NaN or infinities of its own, return the first node that does so from finite values.
        """
        starts = [name for name in self.run.outputs if name in self._by_name]
        region = self._unshared_behind(starts)
        for node in region:
            if _is_broken(node) and not any(map(_is_broken, self._inputs(node))):
                return self._divergence_at(node)
        for node in region:
            if node.sketch is not None and not any(map(self._is_unshared, self._inputs(node))):
                return self._divergence_at(node)
        return None

    def first_value_anywhere(self) -> Divergence | None:
        """Return the first node of all whose value eager does not compute: of state, which no output shows."""
        return next((self._divergence_at(node) for node in self.run.values if self._is_unshared(node)), None)

    def first_adjoint(self, leaf: str) -> Divergence | None:
        """Return the node nearest to the outputs from which on backward the gradient of ``leaf`` differs."""
        here = next((each for each in self.run.values if each.leaf == leaf and self._is_suspect(each)), None)
        while here is not None:
            passed, judged = self._after(here)
            cut = self._first_cut(judged)
            if cut is not None:
                return cut
            wrong = [node for node in judged if self._disagrees(node)]
            if not wrong:
                return self._divergence(passed or [here])
            here = wrong[-1]
        return None

    def first_cut_anywhere(self) -> Divergence | None:
        """Return the first node of all through which a gradient passes in one of the two only."""
        return self._first_cut(each for each in self.run.values if each.place is not None)

    def _first_cut(self, nodes: Iterable[GraphValue]) -> Divergence | None:
        for node in nodes:
            eager = self._counterparts.get(node.name, ())
            if len({each.requires_grad for each in eager}) == 1 and eager[0].requires_grad != node.requires_grad:
                return Divergence(node, eager[0], "form" if eager[0].requires_grad else "eager")
        return None

    def _divergence(self, nodes: Sequence[GraphValue]) -> Divergence:
        """Return the cause among ``nodes``: the counterpart of a custom Function, else the first."""
        made = [node for node in nodes if node.place is not None and node.sketch is not None] or list(nodes)
        for node in made:
            for eager in self._counterparts.get(node.name, ()):
                if eager.function is not None:
                    return Divergence(node, eager)
        counterpart = next(iter(self._counterparts.get(made[0].name, ())), None)
        return Divergence(made[0], counterpart, module=self._module_before(made[0]))

    def _divergence_at(self, node: GraphValue) -> Divergence:
        """Return a node whose value differs, and the call that eager makes with its inputs instead."""
        idle = self._idle_before(node)
        if idle is not None:
            return Divergence(idle, module=self._module_before(idle))
        before = self._before(node)
        takers = before.takers if before is not None and self._modules != {""} else []
        is_left_out = bool(takers) and all((each.module or "") not in self._modules for each in takers)
        return Divergence(
            node,
            breaks=_is_broken(node) and not any(map(_is_broken, self._inputs(node))),
            instead=takers[0] if is_left_out else None,
            module=self._module_before(node),
        )

    def _idle_before(self, node: GraphValue) -> GraphValue | None:
        """Return the input of a node that returns its input, if eager's module computes something from it."""
        for given in self._inputs(node):
            eager = self._counterparts.get(given.name, ())
            if given.place is None or len(eager) != 1:
                continue
            is_idle = any(self._counterparts.get(each.name, ()) == eager for each in self._inputs(given))
            if is_idle and given.place.module in {each.module for each in eager[0].takers}:
                return given
        return None

    def _module_before(self, node: GraphValue) -> str | None:
        before = self._before(node) if self._modules == {""} else None
        return None if before is None or before.origin is None else before.origin.module

    def _before(self, node: GraphValue) -> ProgramValue | None:
        """Return the counterpart of the last computed input of a node."""
        given = sorted(self._inputs(node), key=lambda each: self._order[each.name], reverse=True)
        shared = (eager for each in given for eager in self._counterparts.get(each.name, ())[-1:])
        return next((eager for eager in shared if eager.origin is not None), None)

    def _after(self, start: GraphValue) -> tuple[list[GraphValue], list[GraphValue]]:
        """Return the nodes up to the nearest values with a counterpart, in order, and those with a counterpart."""
        passed: dict[str, GraphValue] = {}
        pending = list(self._users[start.name])
        while pending:
            node = pending.pop()
            if node.name in passed:
                continue
            passed[node.name] = node
            if node.name not in self._counterparts:
                pending += self._users[node.name]
        nodes = sorted(passed.values(), key=lambda node: self._order[node.name])
        return nodes, [node for node in nodes if node.name in self._counterparts]

    def _disagrees(self, node: GraphValue) -> bool:
        eager = self._counterparts.get(node.name, ())
        return bool(eager) and not any(self._same_adjoint(each.adjoint, node.adjoint) for each in eager)

    def _is_suspect(self, leaf: GraphValue) -> bool:
        """Return whether the gradient of a leaf differs, or exists in one of the two only, even a cancelled one."""
        eager = self._counterparts.get(leaf.name, ())
        return self._disagrees(leaf) or any((each.adjoint is None) != (leaf.adjoint is None) for each in eager)

    def _same_adjoint(self, eager: Sketch | None, form: Sketch | None) -> bool:
        known = [each for each in (eager, form) if each is not None]
        if all(not each.nonfinite and each.norm <= self._floor for each in known):
            return True
        return eager is not None and form is not None and eager.distance(form) <= 10 * self.tolerance

    def _unshared_behind(self, starts: Sequence[str]) -> list[GraphValue]:
        found: dict[str, GraphValue] = {}
        pending = [self._by_name[name] for name in starts]
        while pending:
            node = pending.pop()
            if node.name in found or node.place is None or (node.sketch is not None and not self._is_unshared(node)):
                continue
            found[node.name] = node
            pending += [self._by_name[name] for name in node.inputs if name in self._by_name]
        return sorted(found.values(), key=lambda node: self._order[node.name])

    def _inputs(self, node: GraphValue) -> Iterator[GraphValue]:
        """Yield the input tensors of a node, also those in a list or a tuple."""
        for name in node.inputs:
            given = self._by_name.get(name)
            if given is not None and (given.sketch is not None or given.place is None):
                yield given
            elif given is not None:
                yield from self._inputs(given)

    def _is_unshared(self, node: GraphValue) -> bool:
        sketch = node.sketch
        if node.place is None or sketch is None or node.name in self._counterparts:
            return False
        return all(sketch.distance(each) > self.tolerance for each in self._inside.get(sketch.shape, ()))

    def _paired(self, values: Sequence[ProgramValue]) -> dict[str, tuple[ProgramValue, ...]]:
        """Return the possible counterparts of each value of the form."""
        leaves = {each.leaf: each for each in values if each.leaf is not None}
        paired: dict[str, tuple[ProgramValue, ...]] = {}
        paired |= {node.name: (leaves[node.leaf],) for node in self.run.values if node.leaf in leaves}
        for alike, names in self._equal_values(values).items():
            if len(alike) == len(names):
                paired |= {name: (value,) for name, value in zip(names, alike, strict=True)}
            else:
                paired |= dict.fromkeys(names, alike)
        return paired

    def _equal_values(self, values: Sequence[ProgramValue]) -> dict[tuple[ProgramValue, ...], list[str]]:
        """Return the computed values of the form, by name, for each group of values of eager that they equal."""
        by_shape: dict[tuple[int, ...], list[tuple[Sketch, ProgramValue]]] = defaultdict(list)
        for each in values:
            if each.sketch is not None and each.leaf is None:
                by_shape[each.sketch.shape].append((each.sketch, each))
        found: dict[tuple[ProgramValue, ...], list[str]] = defaultdict(list)
        for node in self.run.values:
            if node.sketch is not None and node.leaf is None:
                candidates = by_shape.get(node.sketch.shape, ())
                near = tuple(each for own, each in candidates if node.sketch.distance(own) <= self.tolerance)
                found[near].append(node.name)
        found.pop((), None)
        return found


def _is_broken(node: GraphValue) -> bool:
    return node.sketch is not None and node.sketch.nonfinite > 0
