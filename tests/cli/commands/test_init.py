"""``gradctl init`` as a process: the file that it writes is what ``gradctl check`` runs."""

from __future__ import annotations

import pytest

from tests.cli.command_line import gradctl
from tests.isolation.faulty import written

NEEDS_WIDTH = "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, width): ...\n"
SCRIPT = f"{NEEDS_WIDTH}\nopen('imported', 'w')\n"


@pytest.fixture
def models(tmp_path):
    """A model, one that cannot be made without an argument, and a script that may not be run."""
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep" / "net.py")
    (tmp_path / "wide.py").write_text(NEEDS_WIDTH)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_the_models_of_a_folder_are_what_check_runs(models):
    finished = gradctl("init", cwd=models)
    assert (finished.returncode, finished.stdout.splitlines()) == (
        0,
        [
            "wide.py is not checked: Net needs 'width'. Add --arg width=VALUE",
            "gradctl.toml has 1 target. Run: gradctl check",
        ],
    )
    assert not (models / "imported").exists()
    assert [each.name for each in models.iterdir() if each.name.startswith(".")] == []
    listed = gradctl("check", "--list", "--form", "eager", cwd=models)
    assert (listed.returncode, listed.stdout) == (0, "deep/net.py  eager\n")


def test_a_configuration_is_replaced_only_by_force(models):
    config = models / "gradctl.toml"
    config.write_text("jobs = 1\n")
    finished = gradctl("init", ".", cwd=models)
    assert (finished.returncode, finished.stdout, config.read_text()) == (2, "", "jobs = 1\n")
    assert "Error: gradctl.toml exists. Give --force to replace it by a new gradctl.toml." in finished.stderr
    finished = gradctl("init", models.name, "--force", cwd=models.parent)
    assert (finished.returncode, config.read_text().count("\n[[targets]]\n")) == (0, 1)
    file = f"{models.name}/gradctl.toml"
    assert finished.stdout.splitlines()[-1] == f"{file} has 1 target. Run: gradctl check --config {file}"


def test_a_table_of_pyproject_is_a_configuration_too(models):
    (models / "pyproject.toml").write_text("[tool.gradctl]\njobs = 1\n")
    finished = gradctl("init", cwd=models)
    assert (finished.returncode, (models / "gradctl.toml").exists()) == (2, False)
    assert "Error: pyproject.toml exists." in finished.stderr


def test_a_folder_without_a_model_that_can_be_checked_gets_no_file(models):
    (models / "deep" / "net.py").unlink()
    finished = gradctl("init", cwd=models)
    assert (finished.returncode, finished.stdout, (models / "gradctl.toml").exists()) == (5, "", False)
    assert finished.stderr.endswith(
        "GC110 no Python file in . defines a model that can be checked. Define make_model() in one.\n"
        "wide.py is not checked: Net needs 'width'. Add --arg width=VALUE\n"
    )
