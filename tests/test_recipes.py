"""The recipes for CI: the README shows the files, they are what the CI systems take, and their commands are ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from gradctl.cli.main import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = {
    "github": (ROOT / ".ci/recipes/github-actions.yml").read_text(encoding="utf-8"),
    "gitlab": (ROOT / ".ci/recipes/gitlab-ci.yml").read_text(encoding="utf-8"),
}
HOOKS = (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")
INSTALL = "pip install -r requirements.txt"


def commands(name):
    """Return the shell commands of a recipe, in their order."""
    if name == "github":
        (job,) = yaml.safe_load(RECIPES[name])["jobs"].values()
        return [step["run"] for step in job["steps"] if "run" in step]
    (job,) = yaml.safe_load(RECIPES[name]).values()
    return job["script"]


def parsed(line):
    """Return the options of a command line of ours as click reads them; what it would refuse, it refuses here."""
    _, name, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    return command.make_context(name, list(arguments)).params


def lines_of_ours(text):
    return re.findall(r"^(?:- (?:run: )?|entry: )?(gradctl .*)", re.sub("(?m)^ +", "", text), flags=re.MULTILINE)


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_the_readme_shows_the_file_word_by_word(text):
    assert f"```yaml\n{text}```\n" in README


@pytest.mark.parametrize("name", RECIPES)
def test_after_the_install_one_command_checks_and_reports(name):
    assert commands(name)[0] == INSTALL
    (line,) = commands(name)[1:]
    params = parsed(line)
    assert line.startswith("gradctl check ")
    quality = [("gitlab", "gl-code-quality.json")] if name == "gitlab" else []
    files = [("junit", "gradctl.xml"), *quality, ("json", "gradctl.json")]
    assert [(kind, str(path)) for kind, path in params["files"]] == files
    assert params["format"] == {"github": "github", "gitlab": "console"}[name]


@pytest.mark.parametrize("text", [README, HOOKS, *RECIPES.values()], ids=["README", "hooks", *RECIPES])
def test_every_option_of_check_and_report_that_is_shown_exists(text):
    shown = [line for line in lines_of_ours(text) if line.split()[1] in ("check", "report")]
    assert shown
    for line in shown:
        parsed(line.partition("  #")[0])


@pytest.mark.parametrize("line", ["gradctl check --junit gradctl.xml", "gradctl check --report xml=gradctl.xml"])
def test_an_option_that_does_not_exist_would_be_noticed(line):
    with pytest.raises(click.UsageError):
        parsed(line)


def test_github_keeps_the_reports_also_when_the_check_fails():
    workflow = yaml.safe_load(RECIPES["github"])
    (job,) = workflow["jobs"].values()
    uses = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    assert list(uses) == ["actions/checkout", "actions/setup-python", "actions/upload-artifact"]
    assert uses["actions/setup-python"]["with"]["cache"] == "pip"
    upload = uses["actions/upload-artifact"]
    assert upload is job["steps"][-1]
    assert upload["if"] == "always()"
    assert upload["with"]["path"].split() == ["gradctl.xml", "gradctl.json"]
    assert set(workflow) - {True} == {"name", "permissions", "jobs"}  # YAML 1.1 reads the key "on" as true
    assert workflow[True] == ["push", "pull_request"]


def test_gitlab_reads_its_reports_also_when_the_check_fails():
    (job,) = yaml.safe_load(RECIPES["gitlab"]).values()
    reports = {"junit": "gradctl.xml", "codequality": "gl-code-quality.json"}
    assert job["artifacts"] == {"when": "always", "paths": ["gradctl.json"], "reports": reports}
    assert job["variables"]["PIP_CACHE_DIR"] == "$CI_PROJECT_DIR/" + job["cache"]["paths"][0]


@pytest.mark.parametrize("name", RECIPES)
def test_torch_comes_from_the_index_of_cpu_wheels(name):
    (job,) = (
        yaml.safe_load(RECIPES[name])["jobs"].values() if name == "github" else yaml.safe_load(RECIPES[name]).values()
    )
    given = job["env"] if name == "github" else job["variables"]
    assert given["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu"


def test_the_hook_runs_check_on_its_own_targets():
    (hook,) = yaml.safe_load(HOOKS)
    description = hook.pop("description")
    assert description.endswith(".")
    assert hook == {
        "id": "gradctl-check",
        "name": "gradctl check",
        "entry": "gradctl check",
        "language": "python",
        "types": ["python"],
        "pass_filenames": False,
        "require_serial": True,
    }
    assert parsed(hook["entry"])["paths"] == ()
