"""File names of snapshots that are kept for targets and tests. Nothing here imports torch or msgspec."""

from __future__ import annotations

import hashlib
import re

SUFFIX = ".snapshot"
_MOST_CHARACTERS = 120


def snapshot_name(title: str) -> str:
    """Return the file name for the title of a target or a test, which depends on the title alone.

    A title whose characters do not all stand in a file name, or in which case distinguishes names (``net.py:Model``),
    has a part of its digest at the end: two titles have two names, also on file systems that ignore case.
    """
    text = title.replace("/", "~").replace(":", "@")
    name = re.sub(r"[^\w.\-\[\]+=,~@]+", "-", text, flags=re.ASCII)[:_MOST_CHARACTERS]
    is_exact = name == text and not re.search("[~@]", title)
    has_case = re.search(r"[@\[].*[A-Z]", name) is not None
    digest = "" if is_exact and not has_case else f".{hashlib.sha256(title.encode()).hexdigest()[:8]}"
    return f"{name}{digest}{SUFFIX}"
