"""Environments from an index of stub wheels: complete, used again, and nothing left of those that are not complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradctl.core.errors import ResourceError
from gradctl.environments import torch_environment
from gradctl.environments.child import run_child
from gradctl.environments.torch_environment import CannotInstall, environment_of, list_versions
from tests.environments.stub_index import add_wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return the folder of an index that pip uses in place of any other; uv is not on PATH."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return tmp_path / "simple"


def version_in(python):
    """Return what ``torch.__version__`` is in an environment."""
    return run_child([str(python), "-c", "import torch; print(torch.__version__)"], timeout_seconds=60).output.strip()


def add_program(folder, name, script):
    """Put a shell script on PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_versions_are_those_that_pip_finds(index, tmp_path):
    for version in ("2.10.0", "2.12.1", "2.13.0"):
        add_wheel(index, version)
    assert sorted(list_versions(tmp_path / "cache")) == ["2.10.0", "2.12.1", "2.13.0"]


def test_an_index_without_torch_is_one_sentence_with_what_pip_said(index, tmp_path):
    index.mkdir()
    with pytest.raises(ResourceError, match="GC138 pip cannot list the versions of torch: No matching distribution"):
        list_versions(tmp_path / "cache")


def test_an_environment_is_made_once_and_again_only_if_its_interpreter_is_gone(index, tmp_path):
    add_wheel(index, "2.12.1")
    wheel, hidden = index / "torch" / "torch-2.12.1-py3-none-any.whl", tmp_path / "hidden"
    cache = tmp_path / "cache"
    python = environment_of("2.12.1", cache)
    assert version_in(python) == "2.12.1"
    wheel.rename(hidden)
    assert environment_of("2.12.1", cache) == python
    assert [each.name for each in cache.iterdir()] == [f"2.12.1-{sys.implementation.cache_tag}"]
    hidden.rename(wheel)
    python.unlink()
    python.symlink_to(tmp_path / "gone")
    assert version_in(environment_of("2.12.1", cache)) == "2.12.1"


def test_a_version_that_cannot_be_installed_leaves_nothing_and_says_why(index, tmp_path):
    add_wheel(index, "2.12.1", requires=["gradctl-has-no-such-package"])
    cache = tmp_path / "cache"
    with pytest.raises(CannotInstall, match="No matching distribution found for gradctl-has-no-such-package"):
        environment_of("2.12.1", cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_the_reason(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CannotInstall, match="cache: File exists"):
        environment_of("2.12.1", tmp_path / "cache")


@pytest.mark.skipif(sys.platform == "win32", reason="the stub of uv is a shell script")
def test_uv_is_asked_first_for_the_build_for_the_cpu_and_pip_installs_what_it_cannot(index, tmp_path):
    add_wheel(index, "2.12.1")
    add_program(tmp_path / "programs", "uv", f'echo "$@" > {tmp_path}/arguments\necho "error: no network" >&2\nexit 2')
    python = environment_of("2.12.1", tmp_path / "cache")
    assert version_in(python) == "2.12.1"
    *options, torch = (tmp_path / "arguments").read_text().split()
    assert (options[:2], options[-1], torch) == (["pip", "install"], "--torch-backend=cpu", "torch==2.12.1")


@pytest.mark.slow  # installs pip
def test_an_interpreter_without_pip_has_one_in_the_cache(index, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_environment.importlib.util, "find_spec", lambda name: None)
    add_wheel(index, "2.12.1")
    assert list_versions(tmp_path / "cache") == ["2.12.1"]
    assert (tmp_path / "cache" / f"pip-{sys.implementation.cache_tag}").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the environment of other processes")
def test_an_installation_whose_gradctl_is_killed_leaves_neither_files_nor_processes(index, tmp_path):
    cache, begun = tmp_path / "cache", tmp_path / "begun"
    add_program(
        tmp_path / "programs", "uv", f"echo $$ > {begun}.part\n/bin/mv {begun}.part {begun}\nexec /bin/sleep 100"
    )
    code = f"from gradctl.environments.torch_environment import *\nenvironment_of('2.12.1', Path({str(cache)!r}))"
    gradctl = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(begun.exists)
    installer = int(begun.read_text())
    assert [each for each in cache.iterdir() if not each.name.startswith(".")] == []
    os.kill(gradctl.pid, signal.SIGKILL)
    gradctl.wait()
    wait_for(lambda: not Path(f"/proc/{installer}").exists() and list(cache.iterdir()) == [])


def wait_for(is_so):
    """Return as soon as it is so; fail after a minute."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_program_beyond_its_time_limit_is_ended_with_what_it_started(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
    code += "print('begun', flush=True); time.sleep(100)"
    finished = run_child([sys.executable, "-c", code], timeout_seconds=1, folder=tmp_path)
    assert (finished.exit_status, finished.output) == (None, "begun\n")
    assert list(tmp_path.iterdir()) == []
