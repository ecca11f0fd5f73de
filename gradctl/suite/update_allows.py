"""``gradctl check --write-allows``: accept what fails today in the configuration, and remove unused entries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
from tomlkit.items import AoT, Array

from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, Unit
from gradctl.core.verdicts import failing_severities
from gradctl.suite.configuration import Accepted, Project, parse_configuration
from gradctl.suite.plan import Planned, is_unused

# Accepting a finding changes how the rest is judged: an accepted Function reveals findings behind it.
_MOST_ROUNDS = 4

_Key = tuple[str, str, str | None]


def accept_failing(
    planned: Sequence[Planned], units: Sequence[Unit], run: Callable[[Sequence[Planned]], list[Unit]]
) -> tuple[list[Planned], list[Unit], list[Accepted]]:
    """Return plan and units after accepting what fails, and the entries that accept it; ``run`` judges units again."""
    plan, judged = list(planned), list(units)
    entries: list[Accepted] = []
    for _ in range(_MOST_ROUNDS):
        new = _entries(plan, judged)
        if not new:
            break
        entries = [each for each in entries if _key(each) not in set(map(_key, new))] + new
        changed = [k for k, each in enumerate(plan) if each.accepting(new) != each]
        for k in changed:
            plan[k] = plan[k].accepting(new)
        for k, unit in zip(changed, run([plan[k] for k in changed]), strict=True):
            judged[k] = unit
    return plan, judged, [each for each in entries if not is_unused(each, plan, judged)]


def find_unused(
    project: Project, planned: Sequence[Planned], units: Sequence[Unit], every: Sequence[Planned] = ()
) -> list[Accepted]:
    """Return the entries of the configuration that accepted nothing although all their units (of ``every``) ran."""
    return [each for each in project.configuration.allow if is_unused(each, planned, units, every)]


def rewrite_allows(file: Path, text: str, *, add: Iterable[Accepted], drop: Iterable[Accepted]) -> str:
    """Return the text of a configuration with entries put in, replaced and taken out; all else stays as it is.

    Each entry of ``add`` replaces one for the same finding, target and form. ``text`` is empty for a new file.

    Raises:
        TargetError: GC153 if it is no configuration, or is laid out so that nothing can be put into it.
    """
    project, added = parse_configuration(file, text), list(add)
    gone = {*map(_key, added), *map(_key, drop)}
    kept = tuple(each for each in project.configuration.allow if _key(each) not in gone)
    wanted = msgspec.structs.replace(project.configuration, allow=(*kept, *added))
    # After dotted keys, and inside an inline table, headers like [[allow]] would swallow or damage what follows.
    for new in (tomlkit.aot, partial(tomlkit.array, "[\n]")):
        attempt = _with_entries(project, text.replace("\r\n", "\n"), added, gone, new)
        with contextlib.suppress(TargetError):
            if parse_configuration(file, attempt).configuration == wanted:
                return attempt.replace("\n", "\r\n") if "\r\n" in text else attempt
    raise TargetError(
        "GC153", f"{file} cannot be rewritten as it is laid out. Make [[allow]] entries of 'allow' in it."
    )


def _with_entries(
    project: Project, text: str, added: Sequence[Accepted], gone: Container[_Key], new: Callable[[], AoT | Array]
) -> str:
    """Return the text with the entries; ``new`` makes their list if there is none."""
    document = tomlkit.parse(text)
    table: Any = document
    for key in project.table:
        table.setdefault(key, tomlkit.table(is_super_table=True))
        table = table[key]
    if is_first := "allow" not in table and bool(added):
        table["allow"] = new()
    entries = table.get("allow", [])
    for index, known in reversed(list(enumerate(project.configuration.allow))):
        if _key(known) in gone:
            del entries[index]
    for each in added:
        if isinstance(entries, AoT) and entries and not is_first:  # tomlkit parts the entries of a list of its own
            entries[-1].add(tomlkit.nl())
        entry = tomlkit.table() if isinstance(entries, AoT) else tomlkit.inline_table()
        entry.update({key: value for key, value in msgspec.structs.asdict(each).items() if value not in (None, "")})
        if isinstance(entries, AoT) and is_first and not entries and text:
            entry.trivia.indent = "\n"
        if isinstance(entries, Array) and is_first:
            entries.add_line(entry)
        else:
            entries.append(entry)
    if isinstance(entries, AoT) and not entries:
        del table["allow"]
    return tomlkit.dumps(document)


def _entries(planned: Sequence[Planned], units: Sequence[Unit]) -> list[Accepted]:
    """Return an entry for each finding that fails a unit and can be accepted, with the error that it has now.

    A finding that another one of the unit causes may be gone once that is accepted; it waits for the next round.
    """
    found = []
    for each, unit in zip(planned, units, strict=True):
        severities = failing_severities(each.request.fail_on) if unit.verdict == "fail" else ()
        failing: dict[str, Finding] = {}
        for finding in unit.findings:
            if finding.allow and finding.severity in severities and not finding.allowed:
                known = failing.setdefault(finding.allow, finding)
                failing[finding.allow] = max(known, finding, key=_size)
        codes = {finding.code for finding in failing.values()}
        for allow, finding in failing.items():
            if finding.cause not in codes:
                error = _rounded_up(finding.error) if isinstance(finding.error, float) else None
                form: Any = unit.form
                found.append(Accepted(target=each.entry.title, form=form, finding=allow, error=error))
    return list(dict.fromkeys(found))


def _size(finding: Finding) -> float:
    """Return the error; infinity if it is not a number, so that the entry has no limit."""
    return finding.error if isinstance(finding.error, float) else math.inf


def _key(accepted: Accepted) -> _Key:
    return accepted.finding, accepted.target, accepted.form


def _rounded_up(error: float) -> float:
    """Return an error rounded up to three significant digits."""
    if not error:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(error)) - 2)
    return float(f"{math.ceil(error / digit) * digit:.3g}")
