"""What Dask costs over the suite's own processes, and what a supervisor costs for each unit, in one run.

    python tests/benchmarks/dask_overhead.py [--units 100] [--jobs 2] [--real 20] [--simulated 10000]

Small units are of files that are missing, which end without torch; real ones are the gradcheck of a small model. Both
runners take turns, ten units at a time, on one cluster that ``--dask local`` starts; the time of its start and end is
added. Simulated units have everything but their process: the assignment and the answer are files, and processes that a
unit left behind are searched. With Dask, the supervisor's process also has the scheduler, as with ``--dask local``.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import time
from pathlib import Path

from distributed import LocalCluster

from gradctl.core.findings import Finding, Unit
from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import ANSWER, ASSIGNMENT, Answer, Assignment, UnitRequest, read_message, write_message
from gradctl.isolation.unit_process import UnitProcess
from gradctl.isolation.units import run_units
from gradctl.suite.cluster.connection import LOCAL, cluster_runner
from gradctl.suite.configuration import Configuration, Project

MODEL = str(Path(__file__).parents[2] / "sample_models" / "linear.py")
AT_A_TIME = 10
NO_PROCESS = 1 << 30


def requests(target: str, count: int) -> list[UnitRequest]:
    return [UnitRequest(checking=TargetOptions(target)) for _ in range(count)]


def connected(address: str, jobs: int, some: list[UnitRequest], **options: bool):
    project = Project(Path.cwd() / "gradctl.toml", Configuration())
    return cluster_runner(address, project, some, jobs=jobs, say=lambda text: None, **options)


def compare(title: str, target: str, count: int, jobs: int) -> None:
    """Print the times of both runners, and their ratio."""
    ours = dask = 0.0
    begin = time.perf_counter()
    with connected(LOCAL, jobs, []) as runner:
        around = time.perf_counter() - begin
        for first in range(0, count, AT_A_TIME):
            some = requests(target, min(AT_A_TIME, count - first))
            start = time.perf_counter()
            here = run_units(some, jobs=jobs)
            middle = time.perf_counter()
            there = runner(some)
            ours, dask = ours + middle - start, dask + time.perf_counter() - middle
            assert [unit.verdict for unit in here] == [unit.verdict for unit in there]
        begin = time.perf_counter()
    around += time.perf_counter() - begin
    print(
        f"{count} {title} units, {jobs} at a time: suite {ours:.1f} s, Dask {dask:.1f} s and {around:.1f} s around it"
    )
    print(f"  ratio {(dask + around) / ours:.2f}, without start and end {dask / ours:.2f}")


class Simulated:
    """A process that answers and ends at once."""

    pid, returncode = NO_PROCESS, 0

    def __init__(self, folder: Path) -> None:
        self._folder, self.stdout = folder, io.BytesIO()

    def wait(self) -> int:
        assignment = read_message(self._folder / ASSIGNMENT, Assignment)
        finding = Finding(code="GC101", severity="warning", message="x" * 200, fingerprint="y" * 16)
        target, form = assignment.request.checking.target, assignment.request.form
        unit = Unit(target=target, form=form, verdict="pass", findings=(finding,))
        write_message(self._folder / ANSWER, Answer(nonce=assignment.nonce, unit=unit))
        return 0


def dask_setup(worker: object) -> None:
    """Let units be simulated, in a worker that loads this file."""
    UnitProcess._start = lambda self: Simulated(self._folder)


def simulate(kind: str, count: int) -> None:
    """Print what the supervisor of simulated units takes, in this process."""
    dask_setup(None)
    some = requests("model.py", count)
    ended = []

    def measured(runner) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        units = runner(some, on_result=lambda request, unit: ended.append(unit))
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert len(units) == len(ended) == count
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{kind}: {1e3 * seconds / count:.2f} ms of CPU a unit, {after.ru_maxrss / 1024:.0f} MB at most")

    if kind == "suite":
        measured(lambda some, **callbacks: run_units(some, jobs=8, **callbacks))
        return
    with LocalCluster(n_workers=8, threads_per_worker=1, dashboard_address="127.0.0.1:0", preload=[__file__]) as dask:
        with connected(dask.scheduler_address, 8, [], is_shared=True) as runner:
            measured(runner)


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("units", 100), ("jobs", 2), ("real", 20), ("simulated", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--simulate", choices=("suite", "Dask"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        simulate(options.simulate, options.simulated)
        return
    compare("small", "missing.py", options.units, options.jobs)
    compare("real", MODEL, options.real, options.jobs)
    print(f"{options.simulated} simulated units")
    for kind in ("suite", "Dask"):
        command = [sys.executable, __file__, "--simulate", kind, "--simulated", str(options.simulated)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
