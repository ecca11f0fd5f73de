"""torch's own talk while it captures, saves and loads: warnings, logs, listings; what matters is a sentence of ours."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

__all__ = ["silenced"]


@contextmanager
def silenced() -> Iterator[None]:
    """Keep warnings, logging and what is printed to themselves; all are put back afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
