"""Running ``gradctl`` as a process, the way a person does."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["gradctl"]


def gradctl(*arguments, cwd=None, **environment):
    """Return the finished process of ``gradctl ARGUMENTS``, with both streams as text."""
    return subprocess.run(
        [sys.executable, "-m", "gradctl", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
