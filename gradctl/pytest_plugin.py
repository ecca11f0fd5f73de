"""The pytest plugin: a fixture ``gradctl`` whose checks fail the test, and a marker with their defaults.

Every pytest run of everybody who has gradctl installed imports this file: it loads neither torch nor msgspec.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from gradctl.core.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from gradctl.api import CheckReport

__all__ = ["Gradctl"]

# What the marker may set → the checks that take it.
_DEFAULTS = {
    "allow": ("gradcheck", "compare", "export"),
    "fail_on": ("gradcheck", "compare", "export"),
    "forms": ("compare",),
    "seed": ("gradcheck", "compare", "export"),
}


class Gradctl:
    """What the fixture ``gradctl`` gives: the three checks of ``import gradctl``, which fail the test at once.

    To look at a report that fails, call those of ``import gradctl`` instead.

    Args:
        defaults: options by name, for the calls that do not give them.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults

    def gradcheck(
        self,
        model: Callable[..., Any],
        inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
        **options: Any,
    ) -> CheckReport:
        """Return the report of ``gradctl.gradcheck``, or fail the test with it; ``options`` are those of it."""
        __tracebackhide__ = True
        from gradctl.api import gradcheck

        return _passing(gradcheck(model, inputs, **self._for("gradcheck", options)))

    def compare(
        self,
        model: Callable[..., Any],
        inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
        **options: Any,
    ) -> CheckReport:
        """Return the report of ``gradctl.compare``, or fail the test with it; ``options`` are those of it."""
        __tracebackhide__ = True
        from gradctl.api import compare

        return _passing(compare(model, inputs, **self._for("compare", options)))

    def export(
        self,
        model: Callable[..., Any],
        inputs: Tensor | Sequence[Any] | Mapping[str, Any],
        path: str | os.PathLike[str],
        **options: Any,
    ) -> CheckReport:
        """Return the report of ``gradctl.export``, or fail the test with it; ``options`` are those of it."""
        __tracebackhide__ = True
        from gradctl.api import export

        return _passing(export(model, inputs, path, **self._for("export", options)))

    def _for(self, check: str, options: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in self._defaults.items() if check in _DEFAULTS[name]}, **options}


def _passing(report: CheckReport) -> CheckReport:
    __tracebackhide__ = True
    report.raise_if_failed()
    return report


@pytest.fixture
def gradctl(request: pytest.FixtureRequest) -> Gradctl:
    """gradcheck, compare and export of gradctl: they return a report that passes, and fail the test with any other."""
    defaults: dict[str, Any] = {}
    for marker in request.node.iter_markers("gradctl"):  # the closest first
        problem = _problem(marker)
        if problem:
            pytest.fail(f"@pytest.mark.gradctl of {request.node.nodeid}: {problem}", pytrace=False)
        defaults = {**marker.kwargs, **defaults}
    return Gradctl(defaults)


def _problem(marker: pytest.Mark) -> str:
    """Return what is wrong with the arguments of a marker, or nothing."""
    known = ", ".join(_DEFAULTS)
    if marker.args:
        return f"{marker.args[0]!r} has no name. Give keywords: {known}."
    unknown = next((name for name in marker.kwargs if name not in _DEFAULTS), None)
    return f"no option {unknown!r}{nearest(unknown, _DEFAULTS)}. There are {known}." if unknown else ""


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "gradctl(allow=(), fail_on='error', forms=None, seed=0): defaults of the checks of the fixture gradctl; every "
        "test that uses it has this marker.",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that uses the fixture, so that ``-m gradctl`` selects it."""
    if "gradctl" in getattr(item, "fixturenames", ()):
        item.add_marker("gradctl")
