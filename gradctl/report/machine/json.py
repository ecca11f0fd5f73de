"""The report as JSON: the contract that other tools read. ``schema.json`` beside this file is made from its types."""

from __future__ import annotations

import re

import msgspec

from gradctl.core.errors import GradctlError
from gradctl.core.findings import Report, json_schema


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
    """Return the JSON schema of the report, which the package ships as ``report/schema.json``."""
    return json_schema(Report, "gradctl report")
