"""Every test runs on one thread of torch, and so do the processes it starts: tiny tensors gain nothing from more, and
two busy processes lose a lot. Set before torch is imported, which reads it once.

``-m fast`` selects the files below: every layer in two minutes. ``--sample N`` keeps at most N of the selected cases of
each test, drawn by ``--sample-seed``: CI runs a part of the slow sweeps.
"""

import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine is no reason to fail.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")

ROOT = Path(__file__).parent
# Beginnings of test ids. What runs torch.onnx, a compiler or many processes is left to the whole suite.
FAST = tuple(
    """
    core/ rules/test_catalogue.py rules/test_examples.py report/text/ report/machine/ report/test_formats.py
    report/html/test_page.py report/figures/
    isolation/test_units.py::test_an_answer isolation/test_units.py::test_nothing environments/test_version
    subject/test_ subject/inputs/ subject/loading/ numerics/ onnxio/ tracing/
    joint/test_capture.py::test_what_a_model_keeps
    joint/test_capture.py::test_outputs_in_a_dictionary
    joint/decompositions/test_elementwise.py joint/decompositions/test_register.py
    forms/test_artifact.py forms/test_reasons.py forms/ranks/test_sharing.py forms/torchscript/ forms/exported/
    gradients/test_guard.py gradients/test_function_contracts.py gradients/test_broken_calls.py
    gradients/test_backward_localisation.py gradients/test_gradcheck_clean.py::test_a_right_sample
    comparison/ graphdiff/test_graph_difference.py::test_an_inserted graphdiff/test_graph_parts.py
    inspection/ diagnosis/test_first_change.py diagnosis/ranks/test_rank_values.py passes/
    training/test_plain_runs.py commands/test_trace.py commands/test_compare_files.py suite/ repro/test_sources.py
    snapshots/ cli/test_main.py::test_the_version test_api.py::test_a_
    cases/test_0 cases/test_1 cases/test_2
    test_documents.py test_layers.py test_recipes.py
    """.split()  # noqa: SIM905  # a list of 40 strings reads worse
)

# Files whose tests share what takes many seconds to make: one process of ``-n`` runs them all.
TOGETHER = ("isolation/test_units.py", "fuzz/", "cli/commands/test_compare.py", "cli/commands/test_gradcheck.py")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.removeprefix("tests/").startswith(TOGETHER) else nodeid

    return Scheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="Run at most N cases of each test, drawn by a seed.")
    parser.addoption("--sample-seed", default="", metavar="TEXT", help="What draws them.")


def pytest_ignore_collect(collection_path, config):
    """Import no file that ``-m fast`` has no use for: to import all takes as long as to run those that are fast."""
    file = collection_path.relative_to(ROOT).as_posix()
    is_fast = any(f"{file}::".startswith(each) or each.startswith((f"{file}/", f"{file}::")) for each in FAST)
    return True if config.option.markexpr == "fast" and not is_fast and file != "." else None


@pytest.hookimpl(tryfirst=True)  # before -m deselects by the marker
def pytest_collection_modifyitems(items):
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        if f"{file}::{item.name}".startswith(FAST) and "slow" not in item.keywords:
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
