"""One sentence for an error of torch's capture, whose own messages are pages, with listings and addresses."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

from gradctl.subject.frames import first_line, is_users

# Patterns of torch's messages (2.10 to 2.14); below each, what it means, at HERE in the user's code, and the remedy.
_TABLE = r"""
data-dependent expression
    a branch, a loop or a size depends on the values of a tensor HERE; use torch.where or torch.cond, or a size that
    does not depend on values
data-dependent branching
    a branch or a loop depends on the values of a tensor HERE; use torch.where or torch.cond
Dictionary inputs to traced functions must have consistent type. Found (.+)
    a dictionary among the inputs or outputs has values of two types, \1 HERE; use tensors only
\.numpy\(\) is not supported for tensor subclasses
    a tensor is converted to NumPy, which torch cannot trace HERE; use torch operations
no fake impl registered for <CustomOpDef\((\w+::\w+)\)>|(\w+::\w+): attempted to run this operator with Meta
    operator \1\2 has no fake implementation HERE; register one with torch.library.register_fake
Module '(\S+)' has no attribute '(\w+)' \(This function exists
    attribute '\2' of \1 is a Python function that TorchScript cannot compile HERE; define it as a method
You marked (\w+) as dynamic but your code specialized it to be a constant \(([01])\)
    the size \1 is \2 in the example, which torch.export always treats as a constant HERE; use an example with a size
    of 2 or more
You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)
    the model fixes the size \1 to \2 HERE; use x.shape instead of a number, or omit \1 from --dynamic
The values of (\w+) = .* and (\w+) = .* must always be equal
    the sizes \1 and \2 must be equal HERE; use one name for both in --dynamic
Not all values of (\w+) = .* satisfy the generated guard
    a branch of the model depends on the size \1 HERE; remove the branch, or omit \1 from --dynamic
"""
_MEANINGS = [(pattern, " ".join(text.split())) for pattern, text in re.findall(r"(?m)^(\S.*)\n((?: +.*\n)+)", _TABLE)]
_TRACED_VALUE = re.compile(r"Tracer cannot infer type of .*\n:(?P<said>.*)", re.DOTALL)  # the value printed in between
_SCHEMA = re.compile(r"\s*\w+::\w+.*:\n(?P<said>Expected a value of .*)")
_PLACE = re.compile(r'^ +File "(?P<file>.+)", line (?P<line>\d+)', re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[\w)'\"`])[.?!] +(?=[A-Z])")
_LONG = 160


def reason_of(error: BaseException) -> str:
    """Return why torch rejects a model, where if torch names the line, and what to do if known; without a full stop."""
    error = getattr(error, "inner_exception", error)  # a backend's own, inside Dynamo's
    message = str(error)
    for pattern, meaning in _MEANINGS:
        found = re.search(pattern, message)
        if found is not None:
            place = _guard_place(error, found[found.lastindex or 0]) if "Constraints violated" in message else ""
            return found.expand(meaning).replace(" HERE", _place(message) or place)
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


def _guard_place(error: BaseException, size: str) -> str:
    """Return the user's line that restricts a symbolic size; to the number ``size``, if that is a number."""
    guards = [each for each in _guards(error) if not size.isdigit() or re.search(rf"\b{size}\b", str(each.expr))]
    frames = (frame for each in guards for frame in (each.sloc.maybe_user_loc, each.sloc.framework_loc))
    summaries = (frame for frame in frames if isinstance(frame, traceback.FrameSummary) and is_users(frame.filename))
    first = next(summaries, None)
    return f" ({Path(first.filename).name}, line {first.lineno})" if first is not None else ""


def _guards(error: BaseException) -> list[Any]:
    """Return the guards of symbolic sizes, from the frame of a failed torch.export that has its fake mode."""
    modes = (frame.f_locals.get("fake_mode") for frame, _ in traceback.walk_tb(error.__traceback__))
    environments = (mode.shape_env for mode in modes if mode is not None)
    return getattr(next(environments, None), "guards", [])


def _place(message: str) -> str:
    places = [(Path(found["file"]), found["line"]) for found in _PLACE.finditer(message)]
    file, line = next(((file, line) for file, line in places if is_users(str(file))), (None, ""))
    return f" ({file.name}, line {line})" if file is not None else ""
