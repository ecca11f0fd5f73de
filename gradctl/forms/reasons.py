"""One sentence for an error of torch's capture, whose own messages are pages, with listings and addresses."""

from __future__ import annotations

import re
from pathlib import Path

from gradctl.subject.frames import first_line, is_users

# Messages of torch and their meaning; seen in torch 2.10 to 2.14.
_MEANINGS = (
    (r"data-dependent expression", "a branch, a loop or a size depends on the values of a tensor"),
    (
        r"Dictionary inputs to traced functions must have consistent type. Found (.+)",
        r"a dictionary among its inputs or outputs holds values of two types, \1",
    ),
    (r"\.numpy\(\) is not supported for tensor subclasses", "a tensor is given to numpy, where torch cannot follow it"),
    (
        r"no fake impl registered for <CustomOpDef\((\w+::\w+)\)>|(\w+::\w+): attempted to run this operator with Meta",
        r"operator \1\2 has no fake implementation; torch.library.register_fake gives it one",
    ),
    (r"data-dependent branching", "a branch or a loop depends on the values of a tensor"),
    (
        r"Module '(\S+)' has no attribute '(\w+)' \(This function exists",
        r"attribute '\2' of \1 is a Python function that TorchScript cannot compile",
    ),
)
_TRACED_VALUE = re.compile(r"Tracer cannot infer type of .*\n:(?P<said>.*)", re.DOTALL)  # the value printed in between
_SCHEMA = re.compile(r"\s*\w+::\w+.*:\n(?P<said>Expected a value of .*)")
_PLACE = re.compile(r'^ +File "(?P<file>.+)", line (?P<line>\d+)', re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[\w)'\"`])[.?!] +(?=[A-Z])")
_LONG = 160


def reason_of(error: BaseException) -> str:
    """Return why torch rejects a model: one sentence without a full stop, with the user's line if torch names it."""
    error = getattr(error, "inner_exception", error)  # a backend's own, inside Dynamo's
    message = str(error)
    for pattern, meant in _MEANINGS:
        found = re.search(pattern, message)
        if found is not None:
            return found.expand(meant) + _place(message)
    listed = _TRACED_VALUE.match(message) or _SCHEMA.match(message)
    said = f"{type(error).__name__}: {listed['said']}" if listed is not None else first_line(error)
    if len(said) > _LONG:
        said = _SENTENCE.split(said, maxsplit=1)[0]
    return said.rstrip(" .") + _place(message)


def innermost(error: BaseException) -> BaseException:
    """Return the original error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _place(message: str) -> str:
    places = [(Path(found["file"]), found["line"]) for found in _PLACE.finditer(message)]
    file, line = next(((file, line) for file, line in places if is_users(str(file))), (None, ""))
    return f" ({file.name}, line {line})" if file is not None else ""
