"""The first configuration that ``gradctl init`` writes: what it says, and that all keys are in it."""

from __future__ import annotations

import re
import tomllib

import msgspec

from gradctl.core.findings import Finding, Unit
from gradctl.suite.configuration import Accepted, Configuration, TargetEntry, read_configuration
from gradctl.suite.template import first_configuration


def keys_of(kind):
    return {field.encode_name for field in msgspec.structs.fields(kind)}


def test_each_key_is_explained_by_an_example_that_is_valid(tmp_path):
    text = first_configuration([], [])
    assert tomllib.loads(text) == {}
    examples = re.sub(r"^# (?=\[\[|[\w-]+ = )", "", text, flags=re.MULTILINE)
    assert all("#" in line.partition("= ")[2] for line in examples.splitlines() if re.match(r"[\w-]+ = ", line))
    (tmp_path / "gradctl.toml").write_text(examples, encoding="utf-8")
    read_configuration(tmp_path / "gradctl.toml")
    content = tomllib.loads(examples)
    (target,), (allow,) = content["targets"], content["allow"]
    assert set(content) == keys_of(Configuration)
    assert set(allow) == keys_of(Accepted)
    # 'mode' says what 'train' says; the others are explained above the targets.
    assert keys_of(TargetEntry) - set(target) == (
        keys_of(Configuration) - {"jobs", "snapshots", "targets", "allow"}
    ) | {"train"}


def test_a_target_that_is_not_complete_is_a_comment_with_its_reason():
    mode = "the model is in training mode: 1 Dropout module is active; give --train to say so, or --eval"
    entries = [TargetEntry(target=name) for name in ("a.py", 'b"\n.py', "c.py")]
    units = [
        Unit(target="a.py", form="eager", verdict="fail", status="complete"),
        Unit(target="b.py", form="eager", verdict="inconclusive", status="error", reason="make_model\nraises"),
        Unit(
            target="c.py",
            form="eager",
            verdict="pass",
            findings=(Finding(code="GC105", severity="note", message=mode),),
        ),
    ]
    text = first_configuration(entries, units)
    assert [each["target"] for each in tomllib.loads(text)["targets"]] == ["a.py", "c.py"]
    assert text.endswith(
        """
[[targets]]
target = "a.py"

# [[targets]]
# target = "b\\"\\n.py"  # not checked: make_model raises

[[targets]]
target = "c.py"
# mode = "eval"  # the model is in training mode: 1 Dropout module is active
"""
    )
