"""Environments that have one version of torch each, kept in the user's cache folder: made once, then used again.

An environment has torch and what torch requires, nothing else. A program that runs in it finds all other packages,
gradctl among them, where this interpreter finds them, so that torch alone differs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from gradctl.core.errors import ResourceError
from gradctl.environments.child import Finished, run_child
from gradctl.isolation.cleanup import remove_at_end

_LIST_SECONDS = 300.0
_INSTALL_SECONDS = 3600.0
# Options of pip in the user's environment that name another place to install to, and a path with another torch in it.
_ELSEWHERE = dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PYTHONPATH", "PYTHONHOME"))
_VARIABLES = {**_ELSEWHERE, "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
_PIP_LINE = re.compile(r"^(?:ERROR|error): *(.*\S)", re.MULTILINE)
_SAYS_LITTLE = "ResolutionImpossible"  # pip's last line, after the one that names the packages

# The folders of this interpreter come after those of the environment, whose torch is found first.
_LAUNCH = """
import site, sys
for folder in {path!r}:
    if folder not in sys.path:
        (site.addsitedir if folder.endswith("-packages") else sys.path.append)(folder)
import torch
if torch.__version__.partition("+")[0] != {version!r}:
    sys.exit("torch " + torch.__version__ + " is imported instead of {version}, from " + torch.__file__)
from gradctl.cli.main import main
main()
"""


class CannotInstall(Exception):
    """A version cannot be installed; the text is the reason, as the installer states it."""


def cache_folder() -> Path:
    """Return the folder of all environments; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "gradctl" / "torch"


def list_versions(folder: Path) -> list[str]:
    """Return the versions of torch that pip finds for this interpreter, in pip's order.

    Args:
        folder: the cache, where a pip is installed if this interpreter has none.

    Raises:
        ResourceError: GC138 if pip cannot be run, or finds none.
    """
    try:
        finished = _run([*_pip(folder), "index", "versions", "torch"], _LIST_SECONDS)
        found = re.search(r"^Available versions: *(.+)$", finished.output, re.MULTILINE)
        reason = _reason(finished)
    except (OSError, CannotInstall) as error:
        found, reason = None, str(error)
    if found is None:
        raise ResourceError(
            "GC138",
            f"pip cannot list the versions of torch: {reason}. Check the connection and the index (pip config list).",
        )
    return [version.strip() for version in found[1].split(",")]


def environment_of(version: str, folder: Path) -> Path:
    """Return the interpreter of an environment with this version of torch; it is made if it is missing.

    It is made beside its place and moved there at the end: an environment that is there is complete.

    Args:
        version: for example ``2.13.0``.
        folder: the cache.

    Raises:
        CannotInstall: with the reason.
    """
    pip = _pip(folder)

    def install(python: Path, part: Path) -> None:
        reasons = []
        for installer in _installers(pip, python):
            finished = _run([*installer, f"torch=={version}"], _INSTALL_SECONDS, part)
            if finished.exit_status == 0:
                return
            reasons.append(_reason(finished))
        raise CannotInstall(reasons[-1])

    return _cached(folder / f"{version}-{sys.implementation.cache_tag}", install)


def is_installed(version: str, folder: Path) -> bool:
    """Return whether the environment of a version is in the cache."""
    return _python_in(folder / f"{version}-{sys.implementation.cache_tag}").exists()


def run_gradctl(version: str, python: Path, arguments: Sequence[str], *, timeout_seconds: float) -> Finished:
    """Run a command of the gradctl that runs now in the environment of a version, and return how it ended.

    Raises:
        OSError: the process cannot be started.
    """
    path = [entry for entry in sys.path if isinstance(entry, str)]
    launch = _LAUNCH.format(path=path, version=version)
    # Isolated (-I): PYTHONPATH and the user's site would come before the environment's torch.
    return run_child([str(python), "-I", "-c", launch, *arguments], timeout_seconds=timeout_seconds)


def _pip(folder: Path) -> list[str]:
    """Return the command of pip: that of this interpreter, or one in an environment of its own (uv installs none)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    python = _cached(folder / f"pip-{sys.implementation.cache_tag}", lambda python, part: None, with_pip=True)
    return [str(python), "-m", "pip"]


def _installers(pip: Sequence[str], python: Path) -> list[list[str]]:
    """Return the commands that install into an environment, the best first.

    uv knows the index of builds for the CPU; pip takes what the user's index has, which may be builds for CUDA.
    """
    uv = shutil.which("uv")
    with_uv = [[uv, "pip", "install", "--python", str(python), "--torch-backend=cpu"]] if uv else []
    return [*with_uv, [*pip, "--python", str(python), "install", "--progress-bar", "off"]]


def _cached(place: Path, fill: Callable[[Path, Path], None], *, with_pip: bool = False) -> Path:
    """Return the interpreter of an environment at ``place``, which ``fill`` (interpreter, folder) fills if it is new.

    Raises:
        CannotInstall: it cannot be made; what was begun is removed, also if this process is killed.
    """
    if _python_in(place).exists():  # false if the interpreter that it was made with is gone
        return _python_in(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent)).resolve()
        with remove_at_end(part):
            made = part / "environment"
            command = [sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(made)]
            finished = _run(command, _INSTALL_SECONDS, part)
            if finished.exit_status != 0:
                raise CannotInstall(f"no environment can be made: {_reason(finished)}")
            fill(_python_in(made), part)
            _move(made, place)
    except OSError as error:
        raise CannotInstall(f"{error.filename or place}: {error.strerror or error}") from error
    return _python_in(place)


def _move(made: Path, place: Path) -> None:
    """Move an environment to its place, unless another process has just done so."""
    if place.exists() and not _python_in(place).exists():
        shutil.rmtree(place)
    try:
        made.replace(place)
    except OSError:
        if not _python_in(place).exists():
            raise


def _python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(command: Sequence[str], timeout_seconds: float, folder: Path | None = None) -> Finished:
    return run_child(command, timeout_seconds=timeout_seconds, folder=folder, variables=_VARIABLES)


def _reason(finished: Finished) -> str:
    """Return why an installer failed, in its last line that says so."""
    if finished.exit_status is None:
        return "it exceeded its time limit"
    said = f"{finished.output}\n{finished.errors}"
    lines = [line for line in _PIP_LINE.findall(said) if _SAYS_LITTLE not in line]
    lines = lines or [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else f"exit status {finished.exit_status}"
