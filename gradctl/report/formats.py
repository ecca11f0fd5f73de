"""The table of formats, and putting a report into a file whole."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from gradctl.core.errors import ResourceError
from gradctl.core.findings import Report

# The module of each format, which has ``render(report) -> str``; imported when it is used (rich is slow to start).
FORMATTERS: dict[str, str] = {
    "console": "gradctl.report.text.console",
    "json": "gradctl.report.machine.json",
    "jsonl": "gradctl.report.machine.jsonl",
    "markdown": "gradctl.report.text.markdown",
    "junit": "gradctl.report.machine.junit",
    "github": "gradctl.report.text.github",
    "html": "gradctl.report.html.page",
    "gitlab": "gradctl.report.machine.gitlab",
    "sarif": "gradctl.report.machine.sarif",
}


def render(report: Report, format_name: str) -> str:
    """Return the report as text in one of the formats of ``FORMATTERS``; it ends in a newline."""
    text = importlib.import_module(FORMATTERS[format_name]).render(report)
    assert isinstance(text, str)
    return text


def write(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and move it there, so that a run that fails leaves the old file as it was.

    The new one has its permissions. Pipes and devices (``/dev/stderr``) are written to, never replaced; a link is
    followed.

    Raises:
        ResourceError: GC131 if the file cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)
    except OSError as error:
        raise _unwritable(path, error) from error


def ensure_writable(path: Path) -> None:
    """Return if ``write`` would find a place for ``path`` now; nothing is left behind.

    Raises:
        ResourceError: GC131 with what stands in the way.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not path.exists() or path.is_file():
            beside = _beside(path.resolve())
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _replace(path: Path, content: bytes) -> None:
    beside = _beside(path)
    try:
        beside.write_bytes(content)
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> ResourceError:
    folder = path.parent
    if not folder.exists():
        reason = f"there is no folder {str(folder)!r}. Create it, or use another path."
    else:
        reason = f"{error.strerror or type(error).__name__}. Give a path that you may write to."
    return ResourceError("GC131", f"{str(path)!r} cannot be written: {reason}", exit_code=2)
