"""Targets that name a model of a library: what they say, and what is refused before the library is imported."""

from __future__ import annotations

import sys

import pytest

from gradctl.core.errors import TargetError
from gradctl.core.library_targets import LibraryModel, is_library_target, parse_library_target


def message(text):
    with pytest.raises(TargetError) as caught:
        parse_library_target(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hf:llama", LibraryModel("hf", "llama")),
        ("hf:bert:BertForTokenClassification", LibraryModel("hf", "bert", head="BertForTokenClassification")),
        ("hf:gpt2@sdpa", LibraryModel("hf", "gpt2", attention="sdpa")),
        ("hf:gpt2:GPT2LMHeadModel@eager", LibraryModel("hf", "gpt2", None, "GPT2LMHeadModel", "eager")),
        ("hf:gpt-neox", LibraryModel("hf", "gpt_neox")),
        ("hf:kosmos_2", LibraryModel("hf", "kosmos-2")),
        ("hf:gpt-sw3", LibraryModel("hf", "gpt-sw3")),  # a type that the library lists apart from the others
        ("hf:parakeet_tdt", LibraryModel("hf", "parakeet_tdt")),
    ],
)
def test_a_target_names_type_class_and_attention(text, named):
    assert is_library_target(text)
    assert parse_library_target(text) == named


@pytest.mark.parametrize("text", ["net.py:hf", "hf.py:llama", "timm.models:resnet18", "hf", "package.hf:llama"])
def test_a_file_or_module_is_no_model_of_a_library(text):
    assert not is_library_target(text)


def test_a_folder_is_absolute_and_has_class_and_attention_too(tmp_path, monkeypatch):
    (tmp_path / "model@2").mkdir()
    monkeypatch.chdir(tmp_path)
    named = parse_library_target("hf:./model@2:BertModel@eager")
    assert (named.folder, named.head, named.attention) == (tmp_path / "model@2", "BertModel", "eager")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:", "GC101 'hf:' is not hf:TYPE, hf:TYPE:CLASS, hf:TYPE@ATTENTION or hf:FOLDER."),
        ("hf:gpt2@", "GC101 'hf:gpt2@' is not hf:TYPE, hf:TYPE:CLASS, hf:TYPE@ATTENTION or hf:FOLDER."),
        ("hf:gpt2:", "GC101 'hf:gpt2:' is not hf:TYPE, hf:TYPE:CLASS, hf:TYPE@ATTENTION or hf:FOLDER."),
        ("timm:", "GC101 'timm:' is not timm:NAME."),
        ("timm:vit@eager", "GC101 'timm:vit@eager' is not timm:NAME."),
        (
            "hf:./none",
            "GC101 there is no folder './none'. hf:FOLDER is the folder of a checkpoint; nothing is downloaded.",
        ),
        (
            "hf:lama",
            "GC125 transformers has no model type 'lama' (did you mean 'llama'?). A checkpoint is named by its folder: "
            "hf:./FOLDER.",
        ),
    ],
)
def test_what_is_refused_and_how(text, said):
    assert message(text) == said


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as python marks what cannot be imported
    assert message("hf:llama") == (
        "GC125 'hf:llama' needs the package transformers, which is not installed: pip install transformers."
    )
