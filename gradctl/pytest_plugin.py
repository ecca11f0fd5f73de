"""The pytest plugin: a fixture ``gradctl`` whose checks fail the test, a marker with their defaults, snapshots that are
kept beside the tests, and ``--gradctl``, which runs the targets of ``gradctl.toml`` as tests.

Every pytest run of everybody who has gradctl installed imports this file: it loads neither torch nor msgspec.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradctl.core.errors import GradctlError, nearest

if TYPE_CHECKING:
    from gradctl.check_report import CheckReport
    from gradctl.suite.plan import Planned

_CONFIGURATION = "gradctl.toml"
_WRITTEN = "GC139"  # the note on a snapshot that was written

_MARKED = ("allow", "fail_on", "forms", "seed")  # the options of the checks that the marker may set


@dataclass
class _State:
    """What a process of a run has to report at its end: notes on snapshots that were written, and unused files."""

    written: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


_STATE = pytest.StashKey[_State]()


class Gradctl:
    """The value of the fixture ``gradctl``: the checks of ``import gradctl``, which fail the test at once.

    To look at a report that fails, call those of ``import gradctl`` instead.
    """

    gradcheck: Callable[..., CheckReport]
    compare: Callable[..., CheckReport]
    export: Callable[..., CheckReport]

    def __init__(self, defaults: Mapping[str, Any], test: pytest.Item) -> None:
        self._defaults, self._test, self._titles = defaults, test, set[str]()
        for name in ("gradcheck", "compare", "export"):
            setattr(self, name, partial(self._passing, name))

    def snapshot(self, model: Callable[..., Any], inputs: Any = (), *, name: str = "", **options: Any) -> CheckReport:
        """Return the report of ``gradctl.verify`` with the snapshot of this test, or fail the test.

        The file is in ``__snapshots__`` beside the test. If it is missing, the test fails, unless ``--gradctl-update``
        is given, which writes it, and rewrites one that differs.

        Args:
            model, inputs, options: as in ``gradctl.verify``.
            name: of this snapshot among those of the test; by default they are numbered.
        """
        __tracebackhide__ = True
        path = _as_typed(self._snapshot_path(name))
        is_updated = bool(self._test.config.getoption("--gradctl-update"))
        if not is_updated and not path.exists():
            pytest.fail(f"there is no snapshot {path}. Run pytest with --gradctl-update, and commit the file.")
        try:
            report = self._passing("verify", path, model, inputs, update=is_updated, **options)
        except (AssertionError, GradctlError):
            hint = "If this change is intended, run pytest with --gradctl-update, and commit the file."
            self._test.add_report_section("call", str(path), hint)
            raise
        written = [each.message for unit in report.units for each in unit.findings if each.code == _WRITTEN]
        self._test.config.stash[_STATE].written += written
        return report

    def _snapshot_path(self, name: str) -> Path:
        """Return the file of the next snapshot of the test; two of one name would be one file."""
        __tracebackhide__ = True
        from gradctl.core.names import snapshot_name

        titles = [f"{_title(self._test)}.{name}"] if name else _numbered(_title(self._test))
        title = next((each for each in titles if each not in self._titles), None)
        if title is None:
            pytest.fail(f"this test has two snapshots of the name {name!r}. Give each its own name.")
        self._titles.add(title)
        return _snapshots_of(self._test.path) / snapshot_name(title)

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
    """The checks of gradctl: they return a report that passes, and fail the test with any other."""
    defaults: dict[str, Any] = {}
    for marker in request.node.iter_markers("gradctl"):  # the closest first
        problem = _problem(marker)
        if problem:
            pytest.fail(f"@pytest.mark.gradctl of {request.node.nodeid}: {problem}", pytrace=False)
        defaults = {**marker.kwargs, **defaults}
    return Gradctl(defaults, request.node)


def _title(test: pytest.Item) -> str:
    """Return the name of a test in its file: ``TestNet.test_forward[wide]``."""
    return test.nodeid.partition("::")[2].replace("::", ".")


def _numbered(title: str) -> Iterator[str]:
    """Yield the titles of the snapshots of a test that have no name."""
    yield title
    yield from (f"{title}.{number}" for number in itertools.count(2))


def _snapshots_of(file: Path) -> Path:
    """Return the folder of the snapshots of a test file."""
    return file.parent / "__snapshots__" / file.stem


def _as_typed(path: Path) -> Path:
    """Return a path relative to the current folder, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


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
        from gradctl.suite.configuration import read_configuration
        from gradctl.suite.discovery import select_entries
        from gradctl.suite.plan import plan

        try:
            project = read_configuration(self.path)
            planned = plan(project, select_entries(project, ()), update=self.config.getoption("--gradctl-update"))
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
        from gradctl.check_report import CheckReport
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
        from gradctl.check_report import CheckFailed

        is_ours = isinstance(excinfo.value, CheckFailed)
        return excinfo.getrepr(style="value") if is_ours else super().repr_failure(excinfo, *args)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return the file and the heading of a failure; pytest takes dots in a name for those of modules."""
        return self.path, None, f"{self._planned.entry.title}, {self._planned.form}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradctl`` and ``--gradctl-update``."""
    group = parser.getgroup("gradctl")
    group.addoption(
        "--gradctl",
        action="store_true",
        help=f"Run the targets of {_CONFIGURATION} as tests, one for each form, each in a process of its own.",
    )
    group.addoption(
        "--gradctl-update",
        action="store_true",
        help="Write the snapshots of tests that are missing or differ.",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Return the collector of a configuration, if ``--gradctl`` is given."""
    if file_path.name != _CONFIGURATION or not parent.config.getoption("--gradctl"):
        return None
    return _Configuration.from_parent(parent, path=file_path)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and let ``--gradctl`` alone find the configuration beside the tests that are configured."""
    config.stash[_STATE] = _State()
    beside = config.rootpath / _CONFIGURATION
    if config.getoption("--gradctl") and config.args_source is config.ArgsSource.TESTPATHS and beside.is_file():
        config.args.append(str(beside))
    config.addinivalue_line(
        "markers",
        "gradctl(allow=(), fail_on='error', forms=None, seed=0): defaults of the checks of the fixture gradctl; every "
        "test that uses it has this marker.",
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m deselect tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Find the snapshots beside the collected files that belong to no test of them."""
    titles: dict[Path, list[str]] = {}
    for item in items:
        titles.setdefault(item.path, []).append(_title(item))
    if any("::" in argument for argument in config.args):  # then a file may have more tests than were collected
        return
    for file, names in titles.items():
        if _snapshots_of(file).is_dir():
            config.stash[_STATE].unused += [str(_as_typed(each)) for each in _unused(_snapshots_of(file), names)]


def _unused(folder: Path, titles: Sequence[str]) -> Iterator[Path]:
    """Yield the snapshots in a folder whose names begin with that of no test."""
    from gradctl.core.names import SNAPSHOT_SUFFIX, snapshot_name

    files = {snapshot_name(title) for title in titles}
    begins = tuple(f"{re.sub(r'([.][0-9a-f]{8})?[.]snapshot$', '', name)}." for name in files)
    for each in sorted(folder.glob(f"*{SNAPSHOT_SUFFIX}")):
        if not each.name.startswith(begins):
            yield each


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what is to be reported to the process that reports, if pytest-xdist runs several."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["gradctl"] = asdict(session.config.stash[_STATE])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive what a process of pytest-xdist has to report."""
    sent = getattr(node, "workeroutput", {}).get("gradctl", {})
    state = node.config.stash[_STATE]
    state.written += sent.get("written", [])
    state.unused += sent.get("unused", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report the snapshots that were written, and those that belong to no test."""
    state = config.stash[_STATE]
    for line in sorted(set(state.written)):
        terminalreporter.write_line(f"gradctl: {line}")
    for name in sorted(set(state.unused)):
        terminalreporter.write_line(f"gradctl: the snapshot {name} belongs to no test. Remove it.")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that uses the fixture, so that ``-m gradctl`` selects it."""
    if "gradctl" in getattr(item, "fixturenames", ()):
        item.add_marker("gradctl")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the rule code and the verdict of a failed check in pytest's summary, which cuts a longer text off."""
    report = yield
    checks = sys.modules.get("gradctl.check_report")  # if it was not imported, no check has failed
    crash = getattr(report.longrepr, "reprcrash", None)
    if checks and call.excinfo and crash and isinstance(call.excinfo.value, checks.CheckFailed):
        crash.message = call.excinfo.value.summary
    return report
