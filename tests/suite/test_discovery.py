"""Which targets a run has: from a configuration, from folders, from what is named."""

from __future__ import annotations

import os
import re

import pytest

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.suite.configuration import Configuration, Project, TargetEntry
from gradctl.suite.discovery import find_models, relative_target, select_entries

MODEL = "def make_model():\n    return None\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with models, helpers, a mistake, and what is not looked into."""
    files = {
        "a.py": MODEL,
        "deep/b.py": MODEL,
        "deep/as_value.py": "make_model = lambda: None\n",
        "deep/mistake.py": "def make_model(:\n",
        "helper.py": "from a import make_model\n# make_model\n",
        "inner.py": "class A:\n    def make_model(self): ...\n",
        "package/module.py": "class Net: ...\n",
        ".hidden/c.py": MODEL,
        "__pycache__/d.py": MODEL,
        "env/pyvenv.cfg": "",
        "env/lib/e.py": MODEL,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path / "gradctl.toml", Configuration())


def configured(project, *targets):
    entries = tuple(TargetEntry(target=target, train=True) for target in targets)
    return Project(project.file, Configuration(targets=entries))


def targets(project, *paths):
    return [entry.target for entry in select_entries(project, paths)]


def test_a_folder_gives_the_files_that_define_make_model(project):
    assert targets(project, ".") == ["a.py", "deep/as_value.py", "deep/b.py", "deep/mistake.py"]


def test_without_a_path_the_configuration_says_what_there_is(project):
    assert targets(configured(project, "helper.py:Net", "package.module:Net")) == [
        "helper.py:Net",
        "package.module:Net",
    ]
    assert targets(project) == targets(project, ".")


def test_what_is_configured_of_a_folder_takes_the_place_of_what_is_found(project):
    entries = select_entries(configured(project, "deep/b.py:make_model", "a.py"), ["deep"])
    assert [(entry.target, entry.train) for entry in entries] == [
        ("deep/b.py:make_model", True),
        ("deep/as_value.py", None),
        ("deep/mistake.py", None),
    ]


def test_a_file_or_target_is_taken_as_it_is_or_as_it_is_configured(project):
    assert targets(project, "helper.py", "a.py:other", "package.module:Net") == [
        "helper.py",
        "a.py:other",
        "package.module:Net",
    ]
    both = configured(project, "a.py:one", "a.py:two")
    assert targets(both, "a.py") == ["a.py:one", "a.py:two"]
    assert targets(both, ".")[:2] == ["a.py:one", "a.py:two"]
    assert [entry.train for entry in select_entries(both, ["./a.py:two"])] == [True]


def test_a_model_of_a_library_is_a_target(project, monkeypatch, tmp_path):
    assert targets(project, "hf:llama@eager", "timm:resnet18", "a.py") == ["hf:llama@eager", "timm:resnet18", "a.py"]
    assert [each.train for each in select_entries(configured(project, "hf:bert", "hf:gpt2"), ["hf:bert"])] == [True]
    assert relative_target(tmp_path / "deep", "hf:../saved:BertModel") == f"hf:{tmp_path}/saved:BertModel"
    monkeypatch.chdir(tmp_path / "deep")
    assert targets(project, "hf:./saved@eager") == [f"hf:{tmp_path}/deep/saved@eager"]
    assert relative_target(tmp_path, "hf:llama") == "hf:llama"


def test_a_target_that_is_given_twice_is_one(project):
    assert targets(project, "a.py", "a.py", "./a.py") == ["a.py"]


def test_names_are_relative_to_the_configuration_and_shown_from_here(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path / "deep")
    assert targets(project, "b.py:make_model") == ["deep/b.py:make_model"]
    assert relative_target(tmp_path, "deep/b.py:make_model") == "b.py:make_model"
    assert relative_target(tmp_path, "a.py") == str(tmp_path / "a.py")
    assert relative_target(tmp_path, "package.module:Net") == "package.module:Net"


@pytest.mark.parametrize("folder", [".", "deep/..", "../{name}", "link", "link/deep/.."])
def test_what_is_configured_is_found_whatever_leads_there(folder, project, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    folder = folder.format(name=tmp_path.name)
    entries = select_entries(configured(project, "a.py", "./deep/as_value.py", "deep/../deep/b.py"), [folder])
    assert [entry.target for entry in entries if entry.train] == ["a.py", "./deep/as_value.py", "deep/../deep/b.py"]
    assert [entry.target.removeprefix("link/") for entry in entries if not entry.train] == ["deep/mistake.py"]
    assert [entry.train for entry in select_entries(configured(project, "a.py"), [f"{folder}/a.py"])] == [True]


def test_a_configuration_that_is_named_from_here_has_its_targets(project, tmp_path):
    relative = Project(tmp_path.relative_to(tmp_path) / "gradctl.toml", Configuration())
    assert targets(configured(relative, "deep/b.py:make_model"), "deep")[0] == "deep/b.py:make_model"
    assert relative_target(tmp_path / "deep", "../deep/./b.py") == "deep/b.py"


def test_a_name_that_no_report_can_hold_is_said_before_the_run(project):
    with open(os.fsencode("deep/") + b"bad\xff.py", "w") as file:  # noqa: PTH123  # a name of bytes
        file.write(MODEL)
    with pytest.raises(TargetError, match=r"GC101 the name '.*deep/bad\\udcff\.py' is not UTF-8"):
        select_entries(project, ["deep"])


def test_nothing_to_find(project, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToCheck, match="no Python file in empty has a make_model"):
        select_entries(project, ["empty"])


@pytest.mark.parametrize("path", ["none.py", "none/where", "nofolder", "nomodule.net:Net", "no-module", ".none"])
def test_a_path_that_does_not_exist_is_named(path, project):
    place = path.removesuffix(":Net")
    with pytest.raises(TargetError, match=f"^GC101 {re.escape(repr(place))} does not exist. Give a folder, a file, or"):
        select_entries(project, [path])


def test_a_module_is_found_without_an_import(project, tmp_path):
    (tmp_path / "deep" / "raises.py").write_text("raise SystemExit\n")
    beside = Project(tmp_path / "deep" / "gradctl.toml", Configuration())
    assert targets(beside, "raises:Net", "torch.nn:ReLU") == ["raises:Net", "torch.nn:ReLU"]


@pytest.mark.parametrize(
    ("name", "text", "is_found"),
    [
        ("net.py", "import torch\nclass Net(torch.nn.Module): ...\n", True),
        (
            "net.py",
            "from torch.nn import Linear\nmodel = Linear(3, 2)\nif __name__ == '__main__':\n    print()\n",
            True,
        ),
        ("net.py", "import torch\nclass Net(torch.nn.Module): ...\nfor _ in range(3): Net()\n", False),
        ("net.py", "import torch\nmodel = torch.nn.Linear(3, 2)\ntrain(model)\n", False),
        ("net.py", "import torch\nclass Loss(torch.autograd.Function): ...\n", False),
        ("net.py", "class Net(Module): ...\n", False),
        ("test_net.py", "import torch\nclass Net(torch.nn.Module): ...\n", False),
    ],
)
def test_a_model_is_found_where_nothing_but_definitions_would_run(name, text, is_found, tmp_path):
    """Files with a make_model are found in any case."""
    (tmp_path / "made.py").write_text(f"import torch\nprint()\n{MODEL}")
    (tmp_path / name).write_text(text)
    project = Project(tmp_path / "gradctl.toml", Configuration())
    assert [entry.target for entry in find_models(project)] == ["made.py", *[name] * is_found]
