"""``gradctl.toml``, or ``[tool.gradctl]`` of pyproject.toml: the targets of ``gradctl check``, and accepted findings.

Decoded strictly: an unknown key is an error, reported with its line and the nearest known key.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from gradctl.core.errors import TargetError, nearest
from gradctl.core.names import (
    FORMS,
    LONGEST_SECONDS,
    RANK_FORMS,
    SEVERITIES,
    SNAPSHOT,
    VERDICTS,
    FormName,
    RankFormName,
    Severity,
    UnitForm,
    UnitVerdict,
)
from gradctl.core.target_options import DEFAULTS, OPTIONS, TargetOptions
from gradctl.rules.catalogue import allow_problem

FILE_NAME = "gradctl.toml"
_PYPROJECT = "pyproject.toml"
# TOML's terms by those of msgspec, which are JSON's or Python's.
_WORDS = {"": " | null", "table": "object", "string": "str", "integer": "int"}
_SIZES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_Mode = Literal["train", "eval"]
_Place = tuple[str | int, ...]  # the keys and indices that lead to a value


class Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding that does not fail: an entry of ``[[allow]]``.

    Attributes:
        finding: ``CODE`` or ``CODE:NAME``, where NAME may be a glob.
        target: which, as the configuration names it; may be a glob.
        form: which; None for each.
        error: how far off it may be (norm-relative): what gets worse fails again. None for any error.
        reason: why; for the reader.
    """

    finding: str
    target: str = "*"
    form: UnitForm | None = None
    error: float | None = None
    reason: str = ""


def _with_option_keys(*, is_shared: bool) -> Any:
    """Return a decorator that adds the keys of the target's options, each None if it is not given."""
    keys = [(OPTIONS[name].key, _type_of(name), None) for name in OPTIONS if OPTIONS[name].is_shared == is_shared]
    return lambda kind: msgspec.defstruct(
        kind.__name__, keys, bases=(kind,), module=__name__, frozen=True, kw_only=True
    )


def _type_of(name: str) -> Any:
    """Return the type of an option's value in TOML, which has no paths."""
    option = OPTIONS[name]
    if option.is_mapping:
        return dict[str, bool | int | float | str] | None
    kind: Any = str if option.kind is Path else option.kind
    return (tuple[kind, ...] if DEFAULTS[name] == () else kind) | None


@_with_option_keys(is_shared=True)
class _Forms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    forms: tuple[Literal[FormName, RankFormName], ...] | None = None


class _Settings(_Forms, frozen=True, kw_only=True):
    """Settings of all targets, which an entry can override.

    ``timeout`` is in seconds, ``memory`` in bytes or as ``8GiB``; both are of each process. ``mode`` is the mode of the
    model; None leaves it.
    """

    mode: _Mode | None = None
    timeout: float | None = None
    memory: int | str | None = None
    fail_on: Severity | None = None


@_with_option_keys(is_shared=False)
class TargetEntry(_Settings, frozen=True, kw_only=True):
    """One entry of ``[[targets]]``. Paths are relative to the folder of the configuration.

    Attributes:
        target: ``path/to/file.py:NAME`` or ``package.module:NAME``.
        name: distinguishes entries of one target.
        expect: the expected verdict of a form, if that is not to pass.
        allow: accepted findings, in every form, whatever their size.
    """

    target: str
    name: str | None = None
    expect: dict[UnitForm, UnitVerdict] = {}  # msgspec copies it
    allow: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What the configuration calls it: the target, with its name in brackets where it has one."""
        return f"{self.target}[{self.name}]" if self.name else self.target


class Configuration(_Settings, frozen=True, kw_only=True):
    """All of a configuration; ``jobs`` is how many processes run at a time, ``snapshots`` the folder of snapshots."""

    jobs: int | None = None
    snapshots: str | None = None
    targets: tuple[TargetEntry, ...] = ()
    allow: tuple[Accepted, ...] = ()


_KINDS: dict[str, type[msgspec.Struct]] = {"targets": TargetEntry, "allow": Accepted}


@dataclass(frozen=True, slots=True)
class Project:
    """A configuration with its path; if none was found, an empty one with the path that it would have."""

    file: Path
    configuration: Configuration

    @property
    def root(self) -> Path:
        """The folder that its targets are relative to."""
        return self.file.parent

    @property
    def table(self) -> tuple[str, ...]:
        """The keys that lead to its table in the file."""
        return ("tool", "gradctl") if self.file.name == _PYPROJECT else ()


def settings_of(project: Project, entry: TargetEntry | None = None) -> dict[str, Any]:
    """Return the settings of an entry by key; its own values override those of all targets."""
    settings = [project.configuration, *([entry] if entry else [])]
    given = {
        key: value for each in settings for key, value in msgspec.structs.asdict(each).items() if value is not None
    }
    if "mode" in given:
        given.setdefault("train", given["mode"] == "train")
    return given


def options_of(project: Project, entry: TargetEntry | None = None) -> TargetOptions:
    """Return the options of an entry; without one, the settings of all targets."""
    given, values = settings_of(project, entry), {}
    for name, option in OPTIONS.items():
        value = given.get(option.key)
        if option.is_mapping and value is not None:
            value = tuple(f"{key}={each!r}" for key, each in value.items())
        if value is not None:
            values[name] = project.root / value if option.kind is Path else value
    return TargetOptions(entry.target if entry else "", **values)


def find_configuration(folder: Path) -> Path | None:
    """Return the nearest configuration, from a folder upwards; None if there is none."""
    for each in (folder, *folder.parents):
        if (each / FILE_NAME).is_file():
            return each / FILE_NAME
        if (each / _PYPROJECT).is_file() and _has_table(each / _PYPROJECT):
            return each / _PYPROJECT
    return None


def read_configuration(path: Path) -> Project:
    """Return the configuration in a file.

    Raises:
        TargetError: GC153 if it cannot be read, or is not a valid configuration; names the line.
    """
    return parse_configuration(path, _text(path))


def parse_configuration(path: Path, text: str) -> Project:
    """Return the configuration in ``text``, for a file at ``path``.

    Raises:
        TargetError: GC153 if it is not a valid configuration; names the line.
    """
    try:
        content: Any = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError alone
        raise TargetError(
            "GC153", f"{path} is not TOML: {str(error) or 'it is nested too deeply'}. Correct it."
        ) from error
    table = Project(path, Configuration()).table
    for key in table:
        content = content.get(key, {}) if isinstance(content, Mapping) else {}
    try:
        configuration = msgspec.convert(content, Configuration)
    except msgspec.ValidationError as error:
        message, place = _translate(str(error))
        raise _error(path, text, (*table, *place), message) from error
    for place, problem in _problems(configuration):
        raise _error(path, text, (*table, *place), problem)
    return Project(path, configuration)


def parse_size(size: int | str) -> int:
    """Return the bytes of a size like ``8GiB``.

    Raises:
        ValueError: it is not a size; shows an example.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?(\w*)", str(size).strip())
    if found is None or found[2] not in _SIZES or not float(found[1]):
        raise ValueError(f"{size!r} is not a size. Write, for example, 8GiB or 500MB.")
    return int(float(found[1]) * _SIZES[found[2]])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TargetError("GC153", f"{path} is not TOML: it is not UTF-8. Correct it.") from error
    except OSError as error:
        raise TargetError("GC153", f"{path} cannot be read: {error.strerror}.") from error


def _has_table(path: Path) -> bool:
    """Return whether a pyproject.toml has a table of gradctl; ``read_configuration`` refuses one that is damaged."""
    text = _text(path)
    try:
        tool = tomllib.loads(text).get("tool", {})
    except (ValueError, RecursionError):
        return "[tool.gradctl" in text
    return isinstance(tool, Mapping) and "gradctl" in tool


def _problems(configuration: Configuration) -> Iterator[tuple[_Place, str]]:
    """Yield the place and a message for each value that has the right type and is wrong."""
    if configuration.jobs is not None and configuration.jobs < 1:
        yield ("jobs",), f"jobs = {configuration.jobs} is too small; the minimum is 1"
    yield from _of_settings(configuration, ())
    for index, accepted in enumerate(configuration.allow):
        yield from _of_accepted(accepted, ("allow", index))
    titles = [entry.title for entry in configuration.targets]
    for index, entry in enumerate(configuration.targets):
        if entry.title in titles[:index]:
            message = f"{entry.title!r} is listed twice; add a unique name to each entry (name = …)"
            yield ("targets", index, "target"), message
        yield from _of_entry(entry, ("targets", index))


def _of_accepted(accepted: Accepted, place: _Place) -> Iterator[tuple[_Place, str]]:
    if problem := allow_problem(accepted.finding):
        yield (*place, "finding"), problem
    if accepted.error is not None and not accepted.error >= 0:
        yield (*place, "error"), f"error = {accepted.error} is not the size of an error; use a number of at least 0"


def _of_entry(entry: TargetEntry, place: _Place) -> Iterator[tuple[_Place, str]]:
    if getattr(entry, OPTIONS["training"].key) is not None and entry.mode is not None:
        yield (*place, "train"), "'train' and 'mode' both set the mode; remove 'train'"
    yield from _of_settings(entry, place)
    for index, text in enumerate(entry.allow):
        if problem := allow_problem(text):
            yield (*place, "allow", index), problem


def _of_settings(settings: _Settings, place: _Place) -> Iterator[tuple[_Place, str]]:
    for option in OPTIONS.values():
        value = getattr(settings, option.key, None)
        if option.minimum is not None and value is not None and value < option.minimum:
            key = option.key.replace("_", "-")
            yield (*place, key), f"{key} = {value} is too small; the minimum is {option.minimum}"
        if option.maximum is not None and value is not None and value > option.maximum:
            key = option.key.replace("_", "-")
            yield (*place, key), f"{key} = {value} is too large; the maximum is {option.maximum}"
    if settings.timeout is not None and not 0 < settings.timeout <= LONGEST_SECONDS:
        yield (
            (*place, "timeout"),
            f"timeout = {settings.timeout:g} is not a duration; use seconds above 0, at most {LONGEST_SECONDS:g}",
        )
    if settings.memory is not None:
        try:
            parse_size(settings.memory)
        except ValueError as error:
            yield (*place, "memory"), str(error)


def _translate(said: str) -> tuple[str, _Place]:
    """Return a message of msgspec in TOML's words, and the place that it is about."""
    message, _, path = said.partition(" - at ")
    place: list[str | int] = [
        int(index) if index else key for index, key in re.findall(r"\[(\d+)\]|\.([\w-]+)", path.strip("`"))
    ]
    key = next((each for each in reversed(place) if isinstance(each, str)), "")
    for pattern, translation in _TRANSLATIONS.items():
        if found := re.fullmatch(pattern, message):
            return translation(found[1], key), (*place, found[1])
    for ours, theirs in _WORDS.items():
        message = message.replace(theirs, ours)
    return f"{key or 'all of it'}: {message[:1].lower()}{message[1:]}", tuple(place)


def _unknown_key(word: str, key: str) -> str:
    keys = [field.encode_name for field in msgspec.structs.fields(_KINDS.get(key, Configuration))]
    near = nearest(word, keys) or f"; known keys: {', '.join(keys)}"
    return f"unknown key {word!r}{f' in {key}' if key else ''}{near}"


_VALUES = [*FORMS, *RANK_FORMS, SNAPSHOT, *VERDICTS, *SEVERITIES, *get_args(_Mode)]
# By message of msgspec: what to say of the word in it and the innermost key of its place.
_TRANSLATIONS: dict[str, Callable[[str, str], str]] = {
    "Object contains unknown field `(.*)`": _unknown_key,
    "Object missing required field `(.*)`": lambda word, key: f"an entry of {key} lacks {word!r}",
    "Invalid enum value '?(.*?)'?": lambda word, key: f"{word!r} is not a value of {key}{nearest(word, _VALUES)}",
}


def _error(path: Path, text: str, place: _Place, message: str) -> TargetError:
    line = _line_of(text, place)
    where = f"{path}, line {line}" if line else str(path)
    return TargetError("GC153", f"{where}: {message.rstrip('.')}.")


def _line_of(text: str, place: _Place) -> int | None:
    """Return the line where a value begins: after the last prefix of the text that is TOML and lacks it.

    A missing key has the line of its table; None stands for the whole file.
    """
    lines = text.splitlines()

    def has(count: int) -> bool:
        return _value_in(lines, count, place)[0]

    end = bisect.bisect_left(range(len(lines) + 1), True, key=has)
    if end > len(lines):
        return _line_of(text, place[:-1]) if len(place) > 1 else None
    _, before = _value_in(lines, end - 1, place)
    return 1 + next(k for k in range(before, end) if lines[k].strip() and not lines[k].lstrip().startswith("#"))


def _value_in(lines: Sequence[str], count: int, place: _Place) -> tuple[bool, int]:
    """Return whether the longest prefix of at most ``count`` lines that is TOML has a value, and its length."""
    while True:  # at the latest, no line is TOML
        try:
            content: Any = tomllib.loads("\n".join(lines[:count]))
            break
        except (ValueError, RecursionError):
            count -= 1
    try:
        for key in place:
            content = content[key]
    except (KeyError, IndexError, TypeError):
        return False, count
    return True, count
