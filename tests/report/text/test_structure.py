"""How graphs differ, in a few lines: what is alike is counted, and one change is told with its names."""

from __future__ import annotations

import pytest

from gradctl.core.structure import Difference, GraphChange, GraphNode, InitializerChange, Structure
from gradctl.report.text.console import render as console
from gradctl.report.text.markdown import render as markdown
from gradctl.report.text.structure import structure_lines
from tests.report import examples

SIZES = {"nodes_before": 8, "nodes_after": 8, "matched": 8, "initializers_before": 3, "initializers_after": 3}


def nodes(*operators):
    return tuple(GraphNode(operator=operator, name=f"n{k}", value=f"v{k}") for k, operator in enumerate(operators))


def fused():
    return GraphChange(kind="fused", before=nodes("MatMul", "Add"), after=nodes("Gemm"))


def with_attribute(before, after, **more):
    differences = (Difference(what="axis", before=before, after=after),)
    return GraphChange(
        kind="attributes", before=nodes("Softmax"), after=nodes("Softmax"), differences=differences, **more
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "the graphs are equal: 8 nodes, 3 initializers"),
        ({"initializers_after": 4}, "the graphs are equal: 8 nodes, 3 to 4 initializers"),
        (
            {"renamed": 5, "moved": 1, "operators_before": {"Identity": 2}},
            "the graphs are equal except for nodes without computation: 8 nodes, 3 initializers; Identity 2 to 0, "
            "5 values renamed, 1 constants renamed or moved",
        ),
    ],
)
def test_the_same_is_one_line(more, said):
    assert structure_lines(Structure(**SIZES | more)) == [said]


def test_what_is_alike_is_counted_and_what_is_alone_is_named():
    found = Structure(
        **SIZES | {"nodes_after": 6},
        changes=(fused(), fused(), with_attribute("1", None, inside="body of Loop l")),
        initializers=(
            InitializerChange(
                kind="changed", name="w", name_after="w", type_before="float32[2]", type_after="float32[2]",
                error=0.5, max_abs=0.25,
            ),
            InitializerChange(
                kind="changed", name="u", name_after="v", type_before="float32[2]", type_after="int64[2]"
            ),
            InitializerChange(kind="added", name="c", type_after="int64[1]"),
        ),
        model=(Difference(what="opset ai.onnx", before="18", after="20"),),
    )  # fmt: skip
    assert structure_lines(found) == [
        "graph: 8 to 6 nodes, 8 of them matched; 3 initializers",
        "2 x fused MatMul + Add -> Gemm",
        "attributes Softmax 'n0': axis 1 to - (in body of Loop l)",
        "constants: 2 changed, 1 added",
        "  w float32[2] error 5.00e-01 (relative), max 2.50e-01",
        "  u to v float32[2] to int64[2]",
        "opset ai.onnx 18 to 20",
    ]


def test_many_changes_stay_short():
    changes = [with_attribute(str(k), str(k + 1)) for k in range(100)]
    weights = [InitializerChange(kind="changed", name=f"w{k}", name_after=f"w{k}", error=1.0) for k in range(100)]
    lines = structure_lines(Structure(**SIZES, changes=tuple(changes), initializers=tuple(weights)))
    assert len(lines) <= 12
    assert "and 94 more changes of nodes (--format json has them all)" in lines


@pytest.mark.parametrize("render", [console, markdown])
def test_the_lines_stand_in_a_report(render):
    found = Structure(**SIZES, changes=(fused(), fused()))
    text = render(examples.report_of(examples.unit("pass", form="onnx", structure=found), command="compare"))
    assert "graph: 8 nodes, 8 of them matched; 3 initializers" in text
    assert "2 x fused MatMul + Add" in text


def test_a_long_line_goes_on_further_in_and_names_are_no_markup():
    change = GraphChange(kind="removed", before=(GraphNode(operator="Relu", name="[red]" + "long " * 30, value="v"),))
    report = examples.report_of(examples.unit("pass", form="onnx", structure=Structure(**SIZES, changes=(change,))))
    lines = console(report).splitlines()
    assert lines[1].startswith("  removed Relu '[red]long")
    assert lines[2].startswith("      long")
    assert max(map(len, lines)) <= 80
