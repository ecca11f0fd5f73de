"""A first ``gradctl.toml``: the models of a folder, with a comment on each key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tomlkit

from gradctl.core.findings import Unit
from gradctl.report.text.wording import one_line, why_skipped
from gradctl.suite.configuration import TargetEntry

_IN_TRAINING_MODE = "GC105"


def first_configuration(entries: Sequence[TargetEntry], units: Sequence[Unit]) -> str:
    """Return the text of a configuration for targets, of which ``units`` are the checks of eager.

    A target that could not be loaded or run is a comment with the reason.
    """
    keys = Path(__file__).with_name("template.toml").read_text(encoding="utf-8")
    return "\n".join([keys, *(_entry(entry, unit) for entry, unit in zip(entries, units, strict=True))])


def _entry(entry: TargetEntry, unit: Unit) -> str:
    target = f"target = {tomlkit.string(entry.target).as_string()}"
    if unit.status != "complete":
        return f"# [[targets]]\n# {target}  # not checked: {one_line(why_skipped(unit))}\n"
    modes = [each.message.partition(";")[0] for each in unit.findings if each.code == _IN_TRAINING_MODE]
    return f"[[targets]]\n{target}\n" + "".join(f'# mode = "eval"  # {one_line(mode)}\n' for mode in modes)
