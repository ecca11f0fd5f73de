"""Files that a user names must be plain and not empty: a pipe would block, and a device never ends."""

from __future__ import annotations

from pathlib import Path

from gradctl.core.errors import TargetError, nearest


def ensure_plain(path: Path, code: str, alike: str) -> int:
    """Return the bytes of a plain file, or of one behind a link.

    Args:
        path: the file.
        code: rule code of the refusal.
        alike: pattern of the files to suggest if there is no such file, for example ``*.onnx``.

    Raises:
        TargetError: it is a folder, missing, no plain file, or empty.
        OSError: the system refuses its name.
    """
    if path.is_dir():
        raise TargetError(code, f"{path} is a folder; name a file in it.")
    if not path.is_file():
        if path.exists():
            raise TargetError(code, f"{path} is a pipe or a device, and no file. Write what it gives into a file.")
        near = nearest(path.name, (file.name for file in path.parent.glob(alike)))
        raise TargetError(code, f"there is no file {str(path)!r}{near}.")
    size = path.stat().st_size
    if size == 0:
        raise TargetError(code, f"{path} is empty. Write it again.")
    return size
