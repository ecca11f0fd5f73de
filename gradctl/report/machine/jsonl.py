"""The report as JSON lines: each line is an object that can be read without the others. By its ``type``:

- ``run``, once and first: everything of the report that is not of a unit (tool, command, seed, environment, allows);
- ``unit``: as in the JSON report, without its tensors and findings;
- ``tensor`` and ``finding``: as in the JSON report, with ``target`` and ``form`` of their unit;
- ``summary``, once and last: status and verdict of the run, and the units by verdict. A file without it was cut off.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gradctl.core.findings import Report


def render(report: Report) -> str:
    """Return the report, one JSON object a line."""
    run: dict[str, Any] = msgspec.to_builtins(report, order="deterministic")
    units, verdict, summary = run.pop("units"), run.pop("verdict"), run.pop("summary")
    lines: list[dict[str, Any]] = [{"type": "run", **run}]
    for unit in units:
        tensors, findings = unit.pop("tensors"), unit.pop("findings")
        place = {"target": unit["target"], "form": unit["form"]}
        lines.append({"type": "unit", **unit})
        lines += [{"type": "tensor", **place, **tensor} for tensor in tensors]
        lines += [{"type": "finding", **place, **finding} for finding in findings]
    lines.append({"type": "summary", "status": run["status"], "verdict": verdict, "summary": summary})
    return "".join(msgspec.json.encode(line).decode() + "\n" for line in lines)
