"""The files of a project, taken to another machine: packed once, unpacked below a folder, and named as they are here.

A file with the absolute path P lies at FOLDER/P there. A request is moved below FOLDER before it runs, and what its
unit says of files is moved back.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from gradctl.core.errors import GradctlError
from gradctl.isolation.protocol import UnitRequest
from gradctl.suite.configuration import Project
from gradctl.suite.discovery import absolute, every_file, module_and_name

_MOST_BYTES = 256 << 20
_PER_FILE = 1 << 10  # of the archive
_INSTEAD = "Add --shared if the workers have the folder at the same path"


def pack(project: Project, requests: Sequence[UnitRequest]) -> tuple[bytes, int]:
    """Return an archive of the files in the folder of a configuration, and how many they are.

    Hidden files, caches, environments, and links to folders are left out.

    Raises:
        GradctlError: GC155 if the files are too large, or if a unit reads a file that is not among them.
    """
    root, size, files = absolute(project.root), 0, []
    for file in every_file(root):
        with contextlib.suppress(OSError):
            if file.is_file() and not file.name.startswith("."):
                size += file.stat().st_size + _PER_FILE
                files.append(file)
        if size > _MOST_BYTES:
            most = f"{_MOST_BYTES >> 20} MiB"
            raise GradctlError("GC155", f"the files in {str(root)!r} are more than {most}. {_INSTEAD}.")
    packed = {*files, *(folder for file in files for folder in file.parents)}
    for path in _read_by(requests):
        if path.exists() and path not in packed:
            what = f"{str(path)!r} does not go to the workers: it is not in {str(root)!r}, or hidden or built there."
            raise GradctlError("GC155", f"{what} {_INSTEAD}, or move it.")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", dereference=True) as archive:
        for file in files:
            with contextlib.suppress(OSError):  # removed meanwhile, or not readable: a unit that needs it says so
                archive.add(file, file.relative_to(root).as_posix())
    return content.getvalue(), len(files)


class Shipped:
    """The files of a project below a folder of another machine.

    Args:
        folder: without links in its path; it is made.
        root: the project's folder where it came from, absolute.
        real: the same without links.
        archive: of ``pack``.
    """

    def __init__(self, folder: Path, root: Path, real: Path, archive: bytes) -> None:
        self._folder, self._root = folder, root
        self.below(real).mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(self.below(real), filter="data")
        if not self.below(root).exists():
            self.below(root).parent.mkdir(parents=True, exist_ok=True)
            self.below(root).symlink_to(self.below(real))

    def below(self, path: Path) -> Path:
        """Return where a path of the other machine is on this one."""
        return self._folder / path.relative_to(path.anchor)

    def moved(self, request: bytes) -> bytes:
        """Return a request in JSON with each path in the project's folder moved below the folder."""
        here, root = _in_json(self.below(self._root)), _in_json(self._root)
        # After a quote, 'hf:' and 'KEY=': elsewhere the same text is a part of another path.
        return re.sub(rb'(?<=["=:])' + re.escape(root) + rb'(?=[/:"])', lambda _: here, request)

    def moved_back(self, unit: bytes) -> bytes:
        """Return a unit in JSON with each path below the folder as it is on the other machine."""
        return unit.replace(_in_json(self._folder), b"")


def _in_json(path: Path) -> bytes:
    return msgspec.json.encode(str(path))[1:-1]


def _read_by(requests: Sequence[UnitRequest]) -> Iterator[Path]:
    """Yield the absolute paths of files that units are told to read; of some, there may be none."""
    for request in requests:
        options = request.checking
        place, _ = module_and_name(options.target)
        library, _, folder = place.partition(":")
        named = (folder if library == "hf" else place, options.weights, options.inputs_file, request.snapshot)
        yield from (absolute(Path(path)) for path in named if path is not None)
