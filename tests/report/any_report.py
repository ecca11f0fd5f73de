"""A hypothesis strategy for any report that the types allow, made from the types themselves."""

from __future__ import annotations

import typing

import msgspec
from hypothesis import strategies as st

from gradctl.core.findings import Report
from gradctl.core.numbers import Number

__all__ = ["reports"]

_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_SIGNED = st.integers(-(2**63), 2**63 - 1)
# Lone surrogates are no text: they cannot be encoded.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_LEAVES = {str: _TEXT, int: _SIGNED, float: _FINITE, bool: st.booleans(), type(None): st.none()}


def _of(annotation):
    if annotation in _LEAVES:
        return _LEAVES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return _struct(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(_of(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(_of(arguments[0]), _of(arguments[1]), max_size=2)
    if origin is typing.Annotated:
        return st.just(1)  # schema_version, the only one: from 1 to 1
    return st.one_of(*map(_of, arguments))


def _struct(struct):
    fields = {name: _of(hint) for name, hint in typing.get_type_hints(struct, include_extras=True).items()}
    return st.fixed_dictionaries(fields).map(lambda values: struct(**values))


assert typing.get_args(Number), "a number is a union, which _of takes apart"
reports = _struct(Report)
