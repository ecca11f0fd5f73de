"""``gradctl check --write-allows``: what fails today goes into the configuration, and what is of no use there goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import tomlkit
from tomlkit.items import AoT

from gradctl.core.findings import Unit
from gradctl.core.names import SEVERITIES
from gradctl.suite.configuration import Accepted, Project
from gradctl.suite.gate import Planned, is_of_no_use

__all__ = ["accept_failing", "rewritten", "without_use"]

# What is accepted changes how the rest is judged: a Function that is taken as meant lays bare what is behind it.
_MOST_ROUNDS = 4


def accept_failing(
    planned: Sequence[Planned], units: Sequence[Unit], run: Callable[[Sequence[Planned]], list[Unit]]
) -> tuple[list[Planned], list[Unit], list[Accepted]]:
    """Return the plan and the units as they are once what fails is accepted, and the entries that accept it.

    Args:
        planned: the units as planned.
        units: as judged, in the same order.
        run: judges units once more.
    """
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
    return plan, judged, [each for each in entries if not is_of_no_use(each, plan, judged)]


def without_use(project: Project, planned: Sequence[Planned], units: Sequence[Unit]) -> list[Accepted]:
    """Return the entries of the configuration that accept nothing any more, where all that they are for ran."""
    return [each for each in project.configuration.allow if is_of_no_use(each, planned, units)]


def rewritten(project: Project, text: str, *, add: Iterable[Accepted], drop: Iterable[Accepted]) -> str:
    """Return the text of a configuration with entries put in, replaced and taken out; all else stays as it is.

    Args:
        project: what the text says.
        text: empty for a file that is to be made.
        add: entries; each replaces one for the same finding, target and form.
        drop: entries to take out.
    """
    added = list(add)
    gone = {*map(_key, added), *map(_key, drop)}
    document = tomlkit.parse(text)
    table: Any = document
    for key in project.table:
        table.setdefault(key, tomlkit.table(is_super_table=True))
        table = table[key]
    if "allow" not in table and added:
        table["allow"] = tomlkit.aot()
    entries = table.get("allow", [])
    for index, known in reversed(list(enumerate(project.configuration.allow))):
        if _key(known) in gone:
            del entries[index]
    if isinstance(entries, AoT) and entries and added:
        entries[-1].add(tomlkit.nl())
    for each in added:
        entry = tomlkit.table() if isinstance(entries, AoT) else tomlkit.inline_table()
        entry.update({key: value for key, value in msgspec.structs.asdict(each).items() if value not in (None, "")})
        entries.append(entry)
    return tomlkit.dumps(document)


def _entries(planned: Sequence[Planned], units: Sequence[Unit]) -> list[Accepted]:
    """Return an entry for each finding that fails a unit and can be accepted, with the error that it has now.

    What another finding of the unit is the cause of may be gone once that is accepted, and is left for the next round.
    """
    found = []
    for each, unit in zip(planned, units, strict=True):
        severities = SEVERITIES[: SEVERITIES.index(each.request.fail_on) + 1] if unit.verdict == "fail" else ()
        failing = {
            finding.allow: finding
            for finding in unit.findings
            if finding.allow and finding.severity in severities and not finding.allowed
        }
        codes = {finding.code for finding in failing.values()}
        for allow, finding in failing.items():
            if finding.cause not in codes:
                error = _rounded_up(finding.error) if isinstance(finding.error, float) else None
                form: Any = unit.form
                found.append(Accepted(target=each.entry.title, form=form, finding=allow, error=error))
    return list(dict.fromkeys(found))


def _key(accepted: Accepted) -> tuple[str, str, str | None]:
    return accepted.finding, accepted.target, accepted.form


def _rounded_up(error: float) -> float:
    """Return an error with three significant digits, none of it lost."""
    if not error:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(error)) - 2)
    return float(f"{math.ceil(error / digit) * digit:.3g}")
