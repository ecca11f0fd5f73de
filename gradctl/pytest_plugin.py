"""The pytest plugin: a fixture ``gradctl`` whose checks fail the test, a marker with their defaults, and ``--gradctl``,
which runs the targets of ``gradctl.toml`` as tests.

Every pytest run of everybody who has gradctl installed imports this file: it loads neither torch nor msgspec.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradctl.core.errors import nearest

if TYPE_CHECKING:
    from gradctl.api import CheckReport
    from gradctl.suite.plan import Planned

_CONFIGURATION = "gradctl.toml"

_MARKED = ("allow", "fail_on", "forms", "seed")  # the options of the checks that the marker may set


class Gradctl:
    """The value of the fixture ``gradctl``: the three checks of ``import gradctl``, which fail the test at once.

    To look at a report that fails, call those of ``import gradctl`` instead.
    """

    gradcheck: Callable[..., CheckReport]
    compare: Callable[..., CheckReport]
    export: Callable[..., CheckReport]

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        for name in ("gradcheck", "compare", "export"):
            setattr(self, name, partial(self._passing, name))

    def _passing(self, name: str, *args: Any, **options: Any) -> CheckReport:
        """Return the report of the function of this name in ``gradctl``, or fail the test with it."""
        __tracebackhide__ = True
        from gradctl import api

        check: Callable[..., CheckReport] = getattr(api, name)
        takes = inspect.signature(check).parameters
        report = check(*args, **{**{name: each for name, each in self._defaults.items() if name in takes}, **options})
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
    known = ", ".join(_MARKED)
    if marker.args:
        return f"{marker.args[0]!r} has no name. Give keywords: {known}."
    unknown = next((name for name in marker.kwargs if name not in _MARKED), None)
    return f"no option {unknown!r}{nearest(unknown, _MARKED)}. There are {known}." if unknown else ""


class _Configuration(pytest.File):
    """A ``gradctl.toml``: one test for each of its targets in each form."""

    def collect(self) -> Iterator[_Unit]:
        """Yield the tests, those of ``gradctl check --list``."""
        from gradctl.core.errors import GradctlError
        from gradctl.suite.configuration import read_configuration
        from gradctl.suite.discovery import select_entries
        from gradctl.suite.plan import plan

        try:
            project = read_configuration(self.path)
            planned = plan(project, select_entries(project, ()))
        except GradctlError as error:
            raise self.CollectError(str(error)) from error
        root = str(project.root)
        if root not in sys.path:
            sys.path.append(root)  # modules that the configuration names; the processes have our path
        for each in planned:
            yield _Unit.from_parent(self, name=f"{each.entry.title}[{each.form}]", planned=each)


class _Unit(pytest.Item):
    """One target in one form, checked in a process of its own."""

    def __init__(self, *, planned: Planned, **options: Any) -> None:
        super().__init__(**options)
        self._planned = planned
        self.add_marker("gradctl")

    def runtest(self) -> None:
        """Fail with the report unless the unit passes; skip what the form cannot take."""
        from gradctl.api import CheckReport
        from gradctl.core.assembly import assemble_report
        from gradctl.suite.plan import run

        (unit,) = run([self._planned], jobs=1)
        if unit.details and unit.status != "unsupported":  # what it said last; a refusal has its reason
            self.add_report_section("call", "details", unit.details)
        if unit.verdict == "skipped":
            from gradctl.report.text.wording import why_skipped

            pytest.skip(why_skipped(unit))
        asked = self._planned.request.checking
        report = assemble_report("check", [unit], (), seed=asked.seed, device=asked.device, threads=asked.threads)
        CheckReport.of(report).raise_if_failed()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any) -> Any:
        """Return the report alone; of anything else, what pytest shows."""
        from gradctl.api import CheckFailed

        is_ours = isinstance(excinfo.value, CheckFailed)
        return excinfo.getrepr(style="value") if is_ours else super().repr_failure(excinfo, *args)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return the file and the heading of a failure; pytest takes dots in a name for those of modules."""
        return self.path, None, f"{self._planned.entry.title}, {self._planned.form}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradctl``."""
    parser.getgroup("gradctl").addoption(
        "--gradctl",
        action="store_true",
        help=f"Run the targets of {_CONFIGURATION} as tests, one for each form, each in a process of its own.",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Return the collector of a configuration, if ``--gradctl`` is given."""
    if file_path.name != _CONFIGURATION or not parent.config.getoption("--gradctl"):
        return None
    return _Configuration.from_parent(parent, path=file_path)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and let ``--gradctl`` alone find the configuration beside the tests that are configured."""
    beside = config.rootpath / _CONFIGURATION
    if config.getoption("--gradctl") and config.args_source is config.ArgsSource.TESTPATHS and beside.is_file():
        config.args.append(str(beside))
    config.addinivalue_line(
        "markers",
        "gradctl(allow=(), fail_on='error', forms=None, seed=0): defaults of the checks of the fixture gradctl; every "
        "test that uses it has this marker.",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that uses the fixture, so that ``-m gradctl`` selects it."""
    if "gradctl" in getattr(item, "fixturenames", ()):
        item.add_marker("gradctl")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the rule code and the verdict of a failed check in pytest's summary, which cuts a longer text off."""
    report = yield
    api = sys.modules.get("gradctl.api")  # if it was not imported, no check has failed
    crash = getattr(report.longrepr, "reprcrash", None)
    if api and call.excinfo and crash and isinstance(call.excinfo.value, api.CheckFailed):
        crash.message = call.excinfo.value.summary
    return report
