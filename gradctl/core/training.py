"""Training steps in the report: what was compared, and the first step that differs."""

from __future__ import annotations

import msgspec


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What of a unit's training was compared.

    ``steps`` were run in the plain way, with ``optimizer`` on ``loss`` (what is minimised, in words).
    ``first_difference`` is the step, from 1, at which a tensor differs first; null if none does.
    """

    steps: int
    optimizer: str
    loss: str
    first_difference: int | None = None
