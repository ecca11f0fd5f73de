from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl.core.names import snapshot_name


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("sample_models/mlp.py", "sample_models~mlp.py.snapshot"),
        ("net.py:make_model[wide]", "net.py@make_model[wide].snapshot"),
        ("hf:llama", "hf@llama.snapshot"),
        ("TestNet.test_x[relu-3]", "TestNet.test_x[relu-3].snapshot"),
        ("net.py:Model", "net.py@Model.5b01d215.snapshot"),
        ("test_x[a/b c]", "test_x[a~b-c].14810733.snapshot"),
    ],
)
def test_a_name_can_be_read_and_does_not_change(title, name):
    assert snapshot_name(title) == name


TITLES = st.text(st.sampled_from("aAbB/:~@[]-. é\0\\|"), min_size=1, max_size=6)


@given(TITLES, TITLES)
def test_two_titles_have_two_names(one, other):
    assert (snapshot_name(one) == snapshot_name(other)) == (one == other)


@pytest.mark.parametrize(("one", "other"), [("net.py:Model", "net.py:model"), ("test_x[A]", "test_x[a]")])
def test_names_in_one_file_differ_in_more_than_case(one, other):
    assert snapshot_name(one).lower() != snapshot_name(other).lower()


@given(st.text(max_size=300))
def test_a_name_is_a_file_name_on_every_system(title):
    assert re.fullmatch(r"[\w.\-\[\]+=,~@]+", snapshot_name(title), re.ASCII)
    assert len(snapshot_name(title)) < 140
