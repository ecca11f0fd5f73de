"""Every test runs on one thread of torch, and so do the processes it starts: tiny tensors gain nothing from more, and
two busy processes lose a lot. Set before torch is imported, which reads it once.

``-m fast`` selects the files below: every layer in two minutes. ``--sample N`` keeps at most N of the selected cases of
each test, drawn by ``--sample-seed``: CI runs another part of the slow sweeps with each commit.
"""

import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
FAST: tuple[str, ...] = ()


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="Run at most N cases of each test, drawn by a seed.")
    parser.addoption("--sample-seed", default="", metavar="TEXT", help="What draws them, for example a commit.")


@pytest.hookimpl(tryfirst=True)  # before -m deselects by the marker
def pytest_collection_modifyitems(items):
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        if file.startswith(FAST) and "slow" not in item.keywords:
            item.add_marker(pytest.mark.fast)


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)  # of what -m and -k have left
def pytest_draw_sample(config, items):
    count, seed = config.getoption("sample"), config.getoption("sample_seed")
    if count is None:
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        item
        for name, some in cases.items()
        for item in random.Random(f"{seed} {name}").sample(some, min(count, len(some)))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish():
    if "gradctl.forms.onnx.forward" in sys.modules:  # else nothing is exported, and torch.onnx not imported
        from tests.torchlib import share_conversions

        share_conversions()
