"""The text of a snapshot: it is read as it was written, and nothing else is read."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradctl.core.errors import TargetError
from gradctl.snapshots.snapshot_file import (
    SCHEMA_VERSION,
    Header,
    LoadOptions,
    Recorded,
    SnapshotFile,
    TensorRecord,
    Value,
    ValuesFile,
    parse,
    render,
    schema,
)

SHIPPED = files("gradctl.snapshots").joinpath("schema.json").read_text(encoding="utf-8")

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Any text but lone surrogates, which no UTF-8 file can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SHAPES = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
RECORDS = st.builds(
    TensorRecord,
    shape=SHAPES,
    dtype=TEXT,
    digest=TEXT,
    norm=FINITE,
    noise=FINITE,
    nonfinite=st.none() | TEXT,
    elements=st.lists(FINITE, max_size=8).map(tuple),
    projections=st.lists(FINITE, max_size=8).map(tuple),
    largest=st.lists(st.tuples(st.integers(0, 2**40), FINITE), max_size=3).map(tuple),
)
HEADERS = st.builds(
    Header,
    schema_version=st.just(SCHEMA_VERSION),
    name=TEXT,
    options=st.none() | st.builds(LoadOptions, target=TEXT, arguments=st.lists(TEXT, max_size=2).map(tuple)),
    seed=st.integers(-(2**63), 2**63 - 1),
    input_mode=st.sampled_from(["leaf", "clone", "constant"]),
    environment=st.dictionaries(TEXT, TEXT | st.integers(0, 9), max_size=3),
    generators=st.dictionaries(TEXT, TEXT, max_size=3),
    draws=st.tuples(st.integers(0, 2**40), TEXT),
    values=st.none() | st.builds(ValuesFile, name=TEXT, bytes=st.integers(0, 2**40), sha256=TEXT),
)
FILES = st.builds(
    SnapshotFile,
    header=HEADERS,
    values=st.lists(st.builds(Value, name=TEXT, shape=SHAPES, dtype=TEXT, digest=TEXT), max_size=3).map(tuple),
    tensors=st.lists(
        st.builds(
            Recorded,
            quantity=st.sampled_from(["output", "gradient", "buffer"]),
            name=TEXT,
            requires_grad=st.none() | st.booleans(),
            float64=st.none() | RECORDS,
            native=st.none() | RECORDS,
        ),
        max_size=3,
    ).map(tuple),
)


@settings(max_examples=25)
@given(FILES)
def test_a_snapshot_is_read_as_it_was_written(content):
    text = render(content)
    assert parse(text, Path("a.snapshot")) == content
    assert parse(text.replace(b"\n", b"\r\n"), Path("a.snapshot")) == content
    assert len(text.splitlines()) == 2 + len(content.values) + len(content.tensors)
    assert all(isinstance(msgspec.json.decode(line), dict) for line in text.splitlines())


def test_the_schema_that_is_shipped_is_that_of_the_types():
    assert schema() == SHIPPED, "write gradctl.snapshots.snapshot_file.schema() to gradctl/snapshots/schema.json"


@settings(max_examples=25)
@given(FILES)
def test_every_line_follows_the_schema(content):
    validator = jsonschema.Draft202012Validator(json.loads(SHIPPED))
    for line in render(content).splitlines():
        validator.validate(json.loads(line))


RECORDED = Recorded(quantity="output", name="output", native=TensorRecord(shape=(2,), dtype="float32", digest="0a"))
HEADER = Header(
    schema_version=SCHEMA_VERSION,
    name="net.py",
    seed=0,
    input_mode="leaf",
    environment={},
    generators={},
    draws=(0, ""),
)
TEXT_OF_ONE = render(SnapshotFile(header=HEADER, values=(), tensors=(RECORDED,)))


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (TEXT_OF_ONE.rpartition(b'{"line":"end"')[0], "is cut off: its last line, with the digest, is missing"),
        (TEXT_OF_ONE[:-20], "is cut off: its last line, with the digest, is missing"),
        (TEXT_OF_ONE[:-400], "is cut off: its last line, with the digest, is missing"),
        (TEXT_OF_ONE.replace(b'"digest":"0a"', b'"digest":"0b"'), "was edited: its content does not have the digest"),
        (b"".join(TEXT_OF_ONE.splitlines(keepends=True)[::2]), "was edited: its content does not have the digest"),
        (TEXT_OF_ONE.replace(b'"schema_version":1', b'"schema_version":2'), "has schema version 2, and this gradctl"),
        (TEXT_OF_ONE.replace(b'"shape"', b'"size"'), "is damaged in line 2: object contains unknown field `size`"),
        (TEXT_OF_ONE.replace(b'{"line":"tensor"', b'<<<<<<< HEAD\n{"line":"tensor"'), "is damaged in line 2: JSON is"),
        (TEXT_OF_ONE.replace(b'"shape":[2]', b'"shape":["2"]'), "is damaged in line 2: expected `int`, got `str`"),
        (b"import torch\n", "is not a snapshot: its first line is not a header"),
        (b"\xff\xfe", "is not a snapshot: its first line is not a header"),
        (b"[" * 10_000, "is not a snapshot: its first line is not a header"),
    ],
)
def test_what_is_damaged_is_said_in_one_sentence(damaged, said):
    with pytest.raises(TargetError) as raised:
        parse(damaged, Path("a.snapshot"))
    assert (raised.value.code, raised.value.exit_code) == ("GC133", 2)
    assert raised.value.message.startswith(f"a.snapshot {said}")
    assert raised.value.message.endswith(".")
