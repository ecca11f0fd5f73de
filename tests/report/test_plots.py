"""The figures of a report as files: PNG and SVG of each, the same each time."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from gradctl.core.errors import ResourceError
from gradctl.report import plots
from gradctl.report.figures.all_figures import all_figures
from tests.report import examples
from tests.report.html.pages import everything, located, optimized, two_graphs

pytestmark = pytest.mark.skipif(bool(plots.missing()), reason=plots.missing())
_TEXT = "{http://www.w3.org/2000/svg}text"


def texts(file):
    return ["".join(each.itertext()).strip() for each in ET.parse(file).iter(_TEXT)]


def test_each_figure_is_a_png_and_an_svg(tmp_path):
    report = everything()
    written = plots.write_plots(report, tmp_path / "figures")
    names = set(all_figures(report))
    assert {file.name for file in written} == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {file.name for file in written}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written if file.suffix == ".png")
    assert {"matrix", "time"} < names


def test_a_finding_has_its_errors_its_steps_and_its_map(tmp_path):
    plots.write_plots(located(), tmp_path)
    assert "param:layers.0.weight" in texts(tmp_path / "1-eager-errors.svg")
    assert "distance from autograd" in texts(tmp_path / "1-eager-steps-param-layers.0.weight.svg")
    assert (tmp_path / "1-eager-map-param-layers.0.weight.png").exists()


def test_a_graph_has_its_nodes(tmp_path):
    plots.write_plots(two_graphs(), tmp_path / "compare")
    assert [text for text in texts(tmp_path / "compare/1-onnx-graph-1.svg") if "Neg" in text] == ["− Neg", "− Neg"]
    plots.write_plots(optimized(), tmp_path / "optimize")
    assert "after fold" in texts(tmp_path / "optimize/1-onnx-passes.svg")


def test_the_same_report_has_the_same_svg(tmp_path):
    for folder in ("one", "two"):
        plots.write_plots(located(), tmp_path / folder)
    for file in (tmp_path / "one").glob("*.svg"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_names_from_the_program_stay_inside_the_folder_and_are_no_markup(tmp_path):
    tensors = [examples.gradient("../../$x^{<b>", "wrong", error=0.5, budget=1e-7, shape=(2,))]
    report = examples.report_of(examples.unit("fail", tensors, form="../up"))
    written = plots.write_plots(report, tmp_path / "in")
    assert {file.parent for file in written} == {tmp_path / "in"}
    assert any("../../$x^{<b>" in texts(file) for file in written if file.suffix == ".svg")


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "figures").touch()
    with pytest.raises(ResourceError, match="GC131 .*figures' cannot be written: File exists"):
        plots.write_plots(located(), tmp_path / "figures")
