"""The report as JSON: the contract that other tools read. ``schema.json`` beside this file is made from its types."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gradctl.core.errors import GradctlError
from gradctl.core.findings import Report


def render(report: Report) -> str:
    """Return the report as indented JSON; keys stand in the order of the types, those of mappings sorted."""
    return msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=2).decode() + "\n"


def load(content: bytes, name: str = "this") -> Report:
    """Return the report in ``content``, decoded strictly: nothing is converted, unknown keys are passed over.

    Raises:
        GradctlError: GC132 if it is not JSON, or not a report of a version that this gradctl reads.
    """
    try:
        return msgspec.json.decode(content, type=Report, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = re.sub(r"^[A-Z](?=[a-z])", lambda first: first[0].lower(), str(error))
        raise GradctlError(
            "GC132", f"{name} is not a report of gradctl: {reason}. Write it anew with --report json=FILE."
        ) from error


def schema() -> str:
    """Return the JSON schema of the report, which the package ships as ``report/schema.json``.

    It depends on the types alone: the same bytes for every supported version of msgspec, whatever docstrings say.
    """
    described = msgspec.to_builtins(msgspec.json.schema(Report), order="deterministic")
    for definition in described["$defs"].values():
        definition.pop("description", None)  # the docstring of the type, which msgspec 0.23 indents in another way
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "gradctl report", **_sorted(described)}
    return msgspec.json.format(msgspec.json.encode(named, order="deterministic"), indent=2).decode() + "\n"


def _sorted(described: Any) -> Any:
    """Return a part of a schema with the alternatives of each ``anyOf`` in order: msgspec 0.22 changed theirs."""
    if isinstance(described, list):
        return [_sorted(part) for part in described]
    if not isinstance(described, dict):
        return described
    parts = {key: _sorted(part) for key, part in described.items()}
    if isinstance(parts.get("anyOf"), list):
        parts["anyOf"].sort(key=lambda part: msgspec.json.encode(part, order="deterministic"))
    return parts
