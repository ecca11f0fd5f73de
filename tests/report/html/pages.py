"""Reports that have everything the page can show, and the page as a tree of tags."""

from __future__ import annotations

from html.parser import HTMLParser

import msgspec
from msgspec.structs import replace

from gradctl.core.findings import ErrorMap, LadderStep, Location, SourceExcerpt, StepLadder, Timing
from gradctl.core.optimization import GraphSize, Latency, Optimization, PassOutcome
from gradctl.core.structure import DrawnNode, GraphPart, Structure
from tests.report import examples

_VOID = ("meta", "br", "hr", "img", "input", "link")
# Fields that are one of a closed list, or that other fields refer to.
_FIXED = ("verdict", "status", "kind", "severity", "quantity", "change", "code", "cause", "component", "expected")
SOURCE = ("@staticmethod", "def backward(ctx, gradient):", "    return gradient  # wrong: * 2", "")


class Page(HTMLParser):
    """The tags of a page in order with their attributes, its text, and whether each end tag closes the last start."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.is_balanced = [], [], [], True
        self.feed(html)
        self.close()
        self.is_balanced = self.is_balanced and not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.is_balanced = self.is_balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        """Return the attributes of all elements of one tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def ladder(reference, candidate=None, derivative=2.0):
    steps = [LadderStep(step=3e-2 / 4**n, derivative=derivative + 1e-4 / 4**n, error=1e-4 / 4**n) for n in range(8)]
    return StepLadder(steps=tuple(steps), reference=reference, candidate=candidate)


def with_evidence(report, ladder_of_first, errors=None):
    """Return a report with the ladder and the errors in each tensor that has elements."""
    units = []
    for unit in report.units:
        tensors = [
            replace(each, ladder=ladder_of_first, errors=errors) if each.worst else each for each in unit.tensors
        ]
        units.append(replace(unit, tensors=tuple(tensors)))
    return replace(report, units=tuple(units))


def located():
    """A wrong Function, whose line is known."""
    report = examples.spoiled()
    excerpt = SourceExcerpt(file="net.py", line=14, first_line=12, lines=SOURCE)
    return replace(with_evidence(report, ladder(1.0)), sources=(excerpt,))


def chain(operators, changed, twins):
    """Return drawn nodes that use each the one before."""
    return tuple(
        DrawnNode(
            operator=operator,
            name=f"n{place}",
            value=f"v{place}",
            attributes={"axis": "1"},
            inputs=(f"v{place - 1}",),
            sources=(place - 1 if place else None,),
            counterpart=twins.get(place),
            change=changed.get(place),
        )
        for place, operator in enumerate(operators)
    )


def two_graphs():
    """Two Neg that the second graph does not have, between matched nodes."""
    before = chain(["Mul", "Neg", "Neg", "Add"], {1: "removed", 2: "removed"}, {0: 0, 3: 1})
    after = chain(["Mul", "Add"], {}, {0: 0, 1: 3})
    structure = Structure(nodes_before=4, nodes_after=2, matched=2, parts=(GraphPart(before=before, after=after),))
    unit = examples.unit("pass", [examples.gradient("output")], form="onnx", reference="a.onnx", structure=structure)
    return examples.report_of(unit, command="compare")


def optimized():
    part = two_graphs().units[0].structure.parts[0]
    size = GraphSize(operators={"Neg": 2}, nodes=4, initializers=0, parameters=0, bytes=0)
    latency = Latency(median=2e-4, lower_quartile=1.5e-4, upper_quartile=2.5e-4, runs=9)
    kept = PassOutcome(name="fold", backend="onnx-ir", status="kept", seconds=0.2, size=size, latency=latency)
    optimization = Optimization(
        level="default", before=size, after=replace(size, nodes=2), passes=(kept,), parts=(replace(part, alike=3),),
        latency_before=latency, latency_after=latency,
    )  # fmt: skip
    return examples.report_of(examples.unit("pass", form="onnx", optimization=optimization), command="optimize")


def everything():
    """All of the above in one report, with times, several targets, and text that would be markup if it could."""
    errors = ErrorMap(rows=2, columns=3, block_rows=1, block_columns=1, values=(0.0, 1e-9, 0.1, "nan", 2.0, 1e-3))
    timing = Timing(capture=0.5, forward=1e-3, eager_forward=2e-3, training=3e-3, eager_training=4e-3)
    units = [
        *with_evidence(examples.wrong_weight(), ladder(1.0), errors).units,
        *(replace(each, target="ste.py:make", form="export", timing=timing) for each in located().units),
        *two_graphs().units,
        *optimized().units,
        *examples.whole_run().units,
    ]
    report = examples.report_of(*(replace(unit, seconds=0.5 + n) for n, unit in enumerate(units)), command="check")
    return replace(report, sources=located().sources)


def hostile(value, text):
    """Return a report with ``text`` in every field that is free text, and after every name."""
    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        changed = {name: each if name in _FIXED else hostile(each, text) for name, each in fields.items()}
        if isinstance(value, Location) and value.file:
            changed["file"] = value.file
        if isinstance(value, SourceExcerpt):
            changed["file"] = value.file
        return type(value)(**changed)
    if isinstance(value, str) and value not in ("nan", "inf", "-inf", "gradctl"):
        return value + text
    if isinstance(value, tuple):
        return tuple(hostile(each, text) for each in value)
    if isinstance(value, dict):
        return {hostile(key, text): hostile(each, text) for key, each in value.items()}
    return value
