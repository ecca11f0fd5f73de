"""``gradctl verify --bisect-torch`` as a process: environments with the torch at hand, under several versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.cli.command_line import gradctl
from tests.environments.stub_index import add_wheel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
MODEL = """
import torch

SCALE = 1.001 if torch.__version__ == "2.92.0" else 1.0


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x):
        return SCALE * self.fc(x)


def make_model():
    torch.manual_seed(0)
    return Net()


def example_inputs():
    return (torch.ones(4, 3),)
"""


def add_environment(cache, version, own_version=None):
    """Make an environment in the cache with the torch of this interpreter, but for its version number."""
    folder = cache / "gradctl" / "torch" / f"{version}-{sys.implementation.cache_tag}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "torch").mkdir()
    installed = Path(importlib.metadata.distribution("torch").locate_file("torch"))
    for each in [*installed.iterdir(), installed.parent / "torchgen", installed.parent / "functorch"]:
        is_part = each.parent == installed
        if each.name not in ("version.py", "__pycache__"):
            (packages / "torch" / each.name if is_part else packages / each.name).symlink_to(each)
    number = f"__version__ = {own_version or version!r}\n"
    (packages / "torch" / "version.py").write_text((installed / "version.py").read_text() + number)


@pytest.fixture
def run(tmp_path):
    """Return a function that runs gradctl in a folder with a snapshot, an index with stubs of torch, and a cache."""
    (tmp_path / "net.py").write_text(MODEL)
    assert gradctl("snapshot", "net.py", "-o", "net.snapshot", cwd=tmp_path).returncode == 0
    settings = {name: "" for name in os.environ if name.startswith("PIP_")}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (tmp_path / "simple").as_uri()}
    settings |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(tmp_path)}
    return lambda *arguments: gradctl("verify", "net.snapshot", *arguments, cwd=tmp_path, **settings)


def test_the_version_that_changes_the_model_is_found_with_all_that_was_tried(run, tmp_path):
    for version in ("2.91.0", "2.92.0"):
        add_wheel(tmp_path / "simple", version)
        add_environment(tmp_path / "cache", version)
    add_wheel(tmp_path / "simple", "2.93.0")
    add_environment(tmp_path / "cache", "2.93.0", own_version="2.90.0")
    add_wheel(tmp_path / "simple", "2.94.0", requires=["gradctl-has-no-such-package"])
    finished = run("--bisect-torch", "2.91..2.94", "--format", "json")
    assert finished.returncode == 1
    (unit,) = json.loads(finished.stdout)["units"]
    changed = {each["tensor"] for each in unit["findings"] if each["code"] == "GC311"}
    assert changed == {"param:fc.weight", "param:fc.bias", "input:x"}
    found, tried = [each["message"] for each in unit["findings"] if each["code"] == "GC137"]
    assert found.startswith("torch 2.91.0 passes, torch 2.92.0 changes 4 tensors, the worst is ")
    assert "2.94.0 cannot be installed: No matching distribution found for gradctl-has-no-such-package" in tried
    assert f"torch 2.90.0 is imported instead of 2.93.0, from {tmp_path}" in tried
    assert "4 versions of torch, of which about 4 are tried; at most 1 are installed in " in finished.stderr
    assert "\ntorch 2.91.0 passes\n" in finished.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["2.10-2.14"], "'2.10-2.14' is not a range of versions; write, for example, 2.10..2.14."),
        (["2.10..2.14", "--update"], "--update rewrites the snapshot, and --bisect-torch only compares."),
    ],
)
def test_a_command_line_that_cannot_be_bisected_is_a_usage_error(tmp_path, options, said):
    refused = gradctl("verify", "net.snapshot", "--bisect-torch", *options, cwd=tmp_path)
    assert refused.returncode == 2
    assert said in " ".join(refused.stderr.split())
