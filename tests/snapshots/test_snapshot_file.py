"""The text of a snapshot: it is read as it was written, and nothing else is read."""

from __future__ import annotations

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

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
)

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


@given(FILES)
def test_a_snapshot_is_read_as_it_was_written(content):
    text = render(content)
    assert parse(text, Path("a.snapshot")) == content
    assert parse(text.replace(b"\n", b"\r\n"), Path("a.snapshot")) == content
    assert len(text.splitlines()) == 2 + len(content.values) + len(content.tensors)
    assert all(isinstance(msgspec.json.decode(line), dict) for line in text.splitlines())
