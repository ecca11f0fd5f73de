"""``gradctl check --write-allows``: accept what fails today in the configuration, and remove unused entries."""

from __future__ import annotations

import contextlib
import decimal
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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
_ROUNDED_UP = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)

_Key = tuple[str, str, str | None]
_Run = Callable[[Sequence[Planned]], list[Unit]]


def accept_failing(
    planned: Sequence[Planned], units: Sequence[Unit], run: _Run
) -> tuple[list[Planned], list[Unit], list[Accepted]]:
    """Return plan and units after accepting what fails, and the entries that accept it; ``run`` judges units again."""
    plan, judged = list(planned), list(units)
    entries: dict[_Key, Accepted] = {}
    for _ in range(_MOST_ROUNDS):
        new = _entries(plan, judged)
        if not new:
            break
        entries.update((_key(each), each) for each in new)
        plan, judged = _judge_again(plan, judged, new, run)
    return plan, judged, [each for each in entries.values() if not is_unused(each, plan, judged)]


def _judge_again(
    planned: Sequence[Planned], units: list[Unit], new: Sequence[Accepted], run: _Run
) -> tuple[list[Planned], list[Unit]]:
    """Return plan and units once ``new`` is accepted; only the units that it concerns are judged again."""
    plan = [each.accepting(new) for each in planned]
    changed = [k for k, each in enumerate(planned) if plan[k] != each]
    again = dict(zip(changed, run([plan[k] for k in changed]), strict=True))
    return plan, [again.get(k, unit) for k, unit in enumerate(units)]


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
    """Return the text with the entries; ``new`` makes their list if it is missing."""
    document = tomlkit.parse(text)
    table: Any = document
    for key in project.table:
        table.setdefault(key, tomlkit.table(is_super_table=True))
        table = table[key]
    is_first = "allow" not in table
    if is_first and added:
        table["allow"] = new()
    entries = table.get("allow", [])
    for index, known in reversed(list(enumerate(project.configuration.allow))):
        if _key(known) in gone:
            del entries[index]
    for each in added:
        _append(entries, each, is_first=is_first, is_only=not text)
    if isinstance(entries, AoT) and not entries:
        del table["allow"]
    return tomlkit.dumps(document)


def _append(entries: AoT | Array, accepted: Accepted, *, is_first: bool, is_only: bool) -> None:
    """Append an entry to a list, which is new if ``is_first``, in a file that had no text if ``is_only``."""
    is_table = isinstance(entries, AoT)
    entry = tomlkit.table() if is_table else tomlkit.inline_table()
    entry.update({key: value for key, value in msgspec.structs.asdict(accepted).items() if value not in (None, "")})
    if is_table and entries and not is_first:  # tomlkit puts an empty line between the entries of a new list itself
        entries[-1].add(tomlkit.nl())
    elif is_table and not entries and not is_only:
        entry.trivia.indent = "\n"
    (entries.add_line if is_first and isinstance(entries, Array) else entries.append)(entry)


def _entries(planned: Sequence[Planned], units: Sequence[Unit]) -> list[Accepted]:
    """Return an entry for each finding that fails a unit and can be accepted, with the error that it has now."""
    pairs = zip(planned, units, strict=True)
    return list(dict.fromkeys(entry for each, unit in pairs for entry in _entries_of_unit(each, unit)))


def _entries_of_unit(planned: Planned, unit: Unit) -> Iterator[Accepted]:
    """Yield the entries of one unit.

    A finding that another one of the unit causes may be gone once that is accepted; it waits for the next round.
    """
    severities = failing_severities(planned.request.fail_on) if unit.verdict == "fail" else ()
    failing: dict[str, Finding] = {}
    for finding in unit.findings:
        if finding.allow and finding.severity in severities and not finding.allowed:
            failing[finding.allow] = max(failing.get(finding.allow, finding), finding, key=_size)
    codes = {finding.code for finding in failing.values()}
    form: Any = unit.form
    for allow, finding in failing.items():
        if finding.cause not in codes:
            error = float(_ROUNDED_UP.create_decimal(repr(finding.error))) if isinstance(finding.error, float) else None
            yield Accepted(target=planned.entry.title, form=form, finding=allow, error=error)


def _size(finding: Finding) -> float:
    """Return the error; infinity if it is not a number, so that the entry has no limit."""
    return finding.error if isinstance(finding.error, float) else math.inf


def _key(accepted: Accepted) -> _Key:
    return accepted.finding, accepted.target, accepted.form
