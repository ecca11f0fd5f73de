"""Units on a Dask cluster: the same verdicts, whatever becomes of workers, of the supervisor and of the network."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from gradctl.core.errors import GradctlError
from gradctl.core.findings import Unit
from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import UnitRequest, encode
from gradctl.isolation.units import Interrupted
from gradctl.suite.cluster import connection, dispatch, shipment
from gradctl.suite.cluster.connection import cluster_runner
from gradctl.suite.cluster.dispatch import run_units_on
from gradctl.suite.cluster.shipment import Shipped, pack
from gradctl.suite.cluster.workers import Workers
from gradctl.suite.configuration import Configuration, Project, TargetEntry
from gradctl.suite.discovery import select_entries
from gradctl.suite.plan import plan, run
from tests.cli.command_line import gradctl

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'gradctl[distributed]'")

SAMPLES = Path(__file__).parents[2] / "sample_models"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
RAISES = "def make_model():\n    raise ValueError(__file__)\n"
HANGS = "import time\ntime.sleep(600)\n"


def requests(*targets, **options):
    return [UnitRequest(checking=TargetOptions(str(target), **options)) for target in targets]


def connected(address, folder, some=(), **options):
    project = Project(Path(folder) / "gradctl.toml", Configuration())
    return cluster_runner(address, project, list(some), jobs=None, say=lambda text: None, **options)


def without_times(units):
    return [msgspec.structs.replace(unit, seconds=0.0, timing=None) for unit in units]


def marked(folder):
    """Return the processes of units with a folder below ``folder``."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"GRADCTL_UNIT={folder}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def soon(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and two workers in this process, which others reach by TCP."""
    folder = tmp_path_factory.mktemp("scratch")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        local_directory=folder,
    ) as cluster:
        cluster.scratch = folder
        yield cluster


@pytest.mark.parametrize("is_shared", [False, True])
def test_units_are_those_without_dask(cluster, tmp_path, monkeypatch, is_shared):
    root = tmp_path / "project"
    here = tmp_path / "beside"
    for folder in (root, here):
        folder.mkdir()
    (root / "raises.py").write_text(RAISES)
    targets = tuple(TargetEntry(target=name, forms=("eager",)) for name in ("raises.py", "missing.py"))
    project = Project(root / "gradctl.toml", Configuration(targets=targets))
    monkeypatch.chdir(here)
    planned = plan(project, targets)
    expected = run(planned)
    assert expected[0].findings[0].message.count(str(root / "raises.py")) == 1
    with connected(cluster.scheduler_address, root, [each.request for each in planned], is_shared=is_shared) as runner:
        if not is_shared:
            shutil.rmtree(root)  # what runs are the files that were sent
        ended = []
        units = run(planned, runner=runner, on_result=lambda unit: ended.append(unit.target))
    assert without_times(units) == without_times(expected)
    assert sorted(ended) == sorted(each.title for each in planned)
    soon(lambda: not list(cluster.scratch.glob("*/*/gradctl-*")))


@linux
def test_an_interruption_ends_the_units_and_keeps_those_that_are_complete(cluster, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    some = requests(tmp_path / "hangs.py", tmp_path / "missing.py")

    def interrupt(request, unit):
        raise KeyboardInterrupt

    with connected(cluster.scheduler_address, tmp_path, some) as runner:
        with pytest.raises(Interrupted) as interrupted:
            runner(some, on_result=interrupt)
        soon(lambda: not marked(cluster.scratch))
    assert [unit and unit.findings[0].code for unit in interrupted.value.units] == [None, "GC101"]


SUPERVISOR = """
import sys
from tests.suite.test_cluster import connected, requests
if __name__ == "__main__":
    some = requests(sys.argv[2] + "/hangs.py")
    with connected(sys.argv[1], sys.argv[2], some) as runner:
        runner(some)
"""


@linux
def test_a_supervisor_that_is_killed_leaves_nothing_on_the_workers(cluster, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    command = [sys.executable, "-c", SUPERVISOR, cluster.scheduler_address, str(tmp_path)]
    supervisor = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    soon(lambda: marked(cluster.scratch))
    supervisor.kill()
    supervisor.wait()
    soon(lambda: not marked(cluster.scratch))
    soon(lambda: not list(cluster.scratch.glob("*/*/gradctl-*")))


class Lossy:
    """Workers of one thread, of which each is lost that gets a unit of ``killers``; others answer at once.

    ``sent`` has for each unit that was sent its target, and whether it was alone.
    """

    def __init__(self, killers, count=3):
        self.killers, self.names = killers, [f"tcp://host:{number}" for number in range(count)]
        self.sent, self._lost, self._futures, self._alone = [], set(), [], False

    def look(self):
        # Neighbours that were sent to the worker that is lost are lost with it.
        lost, self._lost = self._lost, set()
        for future in self._futures:
            if future.address not in lost and future.target not in self.killers:
                future.answer()
        self._futures = [each for each in self._futures if not each.is_answered]
        return lost

    def forget(self, address):
        raise AssertionError("only of a worker whose place is gone")

    def free(self, busy, *, alone):
        self._alone = alone and not busy
        if alone:
            return None if busy else self.names[0]
        # Two threads each, so that a unit has a neighbour.
        return next((each for each in self.names if Counter(busy)[each] < 2), None)

    def send(self, address, request):
        target = json.loads(request)["checking"]["target"]
        self.sent.append((target, self._alone))
        if target in self.killers:
            self._lost.add(address)
        self._futures.append(Future(address, target, f"{target}-{len(self.sent)}"))
        return self._futures[-1]

    def leave(self):
        pass


class Future:
    def __init__(self, address, target, key):
        self.address, self.target, self.key, self.is_answered = address, target, key, False

    def add_done_callback(self, callback):
        self.callback = callback

    def answer(self):
        self.is_answered = True
        self.callback(self)

    def result(self):
        return encode(Unit(target=self.target, form="eager", verdict="pass"))

    def cancel(self):
        self.is_answered = True

    release = cancel


def test_a_unit_that_ends_its_worker_three_times_is_crashed_and_its_neighbours_pass(monkeypatch):
    monkeypatch.setattr(dispatch, "_WAIT_SECONDS", 0.01)
    workers = Lossy({"2.py"})
    ended = []
    units = run_units_on(
        workers, requests(*(f"{n}.py" for n in range(9))), on_result=lambda request, unit: ended.append(unit)
    )
    assert [unit.status for unit in units] == ["complete"] * 2 + ["crashed"] + ["complete"] * 6
    assert units[2].findings[0].code == "GC801"
    assert "was lost 3 times" in units[2].reason
    assert len(ended) == 9
    counts = Counter(workers.sent)
    assert counts["2.py", False] == 1 and counts["2.py", True] == 2
    assert all(alone for number, (target, alone) in enumerate(workers.sent) if number >= 9)


def test_a_worker_takes_a_unit_that_is_to_run_alone_if_its_host_has_no_other():
    workers = Workers(None, "cluster", None, accepts=None, say=None)
    workers._threads = {"tcp://a:1": 2, "tcp://a:2": 2, "tcp://b:1": 1}
    assert workers.free(["tcp://b:1", "tcp://a:1"], alone=False) == "tcp://a:2"
    assert workers.free(["tcp://b:1", *["tcp://a:1", "tcp://a:2"] * 2], alone=False) is None
    assert workers.free(["tcp://a:2"], alone=True) == "tcp://b:1"
    assert workers.free(["tcp://a:2", "tcp://b:1"], alone=True) is None


def refusal(address, folder, some=(), **options):
    with pytest.raises(GradctlError) as raised, connected(address, folder, some, **options):
        pass
    assert (raised.value.code, raised.value.exit_code) == ("GC155", 2)
    return raised.value.message


@pytest.mark.parametrize(
    "address, said",
    [
        ("tcp://127.0.0.1:1", "no answer in 1 s"),
        ("nowhere", "missing port number in address 'nowhere'"),
        ("udp://here:1", "unknown address scheme 'udp'"),
        ("worker", "a worker answers"),
        ("tls", "TLS expects"),
    ],
)
def test_an_address_without_a_scheduler_is_one_sentence(cluster, tmp_path, monkeypatch, address, said):
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 1)
    address = cluster.workers[0].address if address == "worker" else address
    address = cluster.scheduler_address.replace("tcp", "tls") if address == "tls" else address
    message = refusal(address, tmp_path)
    assert message.startswith(f"the Dask scheduler {address!r} cannot be reached: {said}")
    assert message.endswith("Give its address: --dask tcp://HOST:8786.")


def test_a_cluster_without_workers_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_WORKER_SECONDS", 0)
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as empty:
        address = empty.scheduler_address
        assert refusal(address, tmp_path) == (
            f"the cluster {address} has no workers. Start some: dask worker {address}."
        )


def test_without_dask_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert refusal("local", tmp_path).endswith("pip install 'gradctl[distributed]'.")


def test_other_versions_are_refused_by_name_unless_forced(cluster, tmp_path, monkeypatch):
    mine = connection.worker_versions()
    theirs = {**mine, "torch": "2.0.0", "onnx": None}
    assert connection._differences(mine, {"tcp://a:1": mine}) == ""
    assert connection._differences(mine, {"tcp://a:1": theirs, "tcp://b:1": theirs}) == (
        f"torch 2.0.0 (here {mine['torch']}) on tcp://a:1 and 1 more; onnx is missing (here {mine['onnx']}) on "
        "tcp://a:1 and 1 more"
    )
    gone = connection._differences(mine, {"tcp://a:1": ModuleNotFoundError("No module named 'gradctl'")})
    assert gone.startswith(f"gradctl {mine['gradctl']} cannot be imported (No module named 'gradctl') on tcp://a:1")
    # The workers are in this process, where Dask calls what it was sent in another thread.
    monkeypatch.setattr(
        connection,
        "worker_versions",
        lambda: mine if threading.current_thread() is threading.main_thread() else theirs,
    )
    message = refusal(cluster.scheduler_address, tmp_path)
    assert f"torch 2.0.0 (here {mine['torch']}) on " in message
    assert message.endswith("Install the same there, or add --force-versions.")
    with connected(cluster.scheduler_address, tmp_path, forces_versions=True) as runner:
        assert [unit.findings[0].code for unit in runner(requests("missing.py"))] == ["GC101"]


def test_files_that_do_not_go_to_the_workers_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / ".hidden").mkdir(parents=True)
    for file in ("model.py", ".env", ".hidden/model.py", "../outside.npz"):
        (folder / file).write_text("#" * 100)
    project = Project(folder / "gradctl.toml", Configuration())
    assert pack(project, requests(folder / "model.py", folder / "missing.py", "hf:vit"))[1] == 1
    for some in (
        requests(folder / ".hidden" / "model.py"),
        requests(folder / "model.py", inputs_file=folder.parent / "outside.npz"),
    ):
        with pytest.raises(GradctlError, match="GC155 .* does not go to the workers.* Add --shared"):
            pack(project, some)
    monkeypatch.setattr(shipment, "_MOST_BYTES", 1 << 10)
    with pytest.raises(GradctlError, match="GC155 the files in .* are more than 0 MiB. Add --shared"):
        pack(project, [])


def test_paths_are_moved_as_whole_paths_and_back(tmp_path):
    root = tmp_path / 'a "quoted" folder'
    root.mkdir()
    (root / "model.py").touch()
    archive, _ = pack(Project(root / "gradctl.toml", Configuration()), [])
    shipped = Shipped(tmp_path / "there", root, root, archive)
    target, other = f"{root}/model.py:make", f"/mnt{root}/model.py"
    (request,) = requests(target, arguments=(f"data={root}", f"other={other}", f"near={root}2"))
    moved = json.loads(shipped.moved(encode(request)))["checking"]
    there = tmp_path / "there" / str(root).lstrip("/")
    assert moved["target"] == f"{there}/model.py:make"
    assert moved["arguments"] == [f"data={there}", f"other={other}", f"near={root}2"]
    assert (there / "model.py").is_file()
    assert json.loads(shipped.moved_back(shipped.moved(encode(request)))) == json.loads(encode(request))


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate")
def test_a_scheduler_with_tls_is_reached_by_the_configuration_of_dask(tmp_path):
    import dask

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout"]
    subprocess.run(["openssl", *command, key, "-out", certificate], check=True, capture_output=True)
    settings = {"distributed.comm.tls.ca-file": str(certificate)}
    for who in ("client", "worker", "scheduler"):
        settings |= {f"distributed.comm.tls.{who}.key": str(key), f"distributed.comm.tls.{who}.cert": str(certificate)}
    with dask.config.set(settings):
        with distributed.LocalCluster(
            n_workers=1,
            processes=False,
            protocol="tls://",
            security=distributed.Security(),
            dashboard_address="127.0.0.1:0",
        ) as cluster:
            assert cluster.scheduler_address.startswith("tls://")
            with connected(cluster.scheduler_address, tmp_path) as runner:
                assert [unit.findings[0].code for unit in runner(requests("missing.py"))] == ["GC101"]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--shared"], "--shared needs --dask ADDRESS."),
        (["--force-versions"], "--force-versions needs --dask ADDRESS."),
        (["--dask", "tcp://127.0.0.1:1", "--snapshot", ".", "--update"], "--update writes snapshots"),
    ],
)
def test_options_that_contradict_each_other_are_an_error(tmp_path, options, said):
    (tmp_path / "model.py").write_text("def make_model(): pass\n")
    finished = gradctl("check", *options, cwd=tmp_path)
    assert finished.returncode == 2
    assert said in finished.stderr


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A scheduler here, and two workers of two threads in processes, which start again if they are killed."""
    folder = tmp_path_factory.mktemp("scratch of processes")
    before = dict(os.environ)  # which Dask's nanny changes
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0", local_directory=folder
    ) as cluster:
        cluster.scratch = folder
        yield cluster
    os.environ.clear()
    os.environ.update(before)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_is_killed_during_a_unit_loses_nothing(processes, tmp_path, seed):
    draw = random.Random(seed)
    some = requests(*(f"missing{n}.py" for n in range(8)))
    ended = []

    def kill():
        soon(lambda: marked(processes.scratch))
        time.sleep(draw.uniform(0, 0.5))
        os.kill(draw.choice(list(processes.workers.values())).pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with connected(processes.scheduler_address, tmp_path, some) as runner:
        killer.start()
        units = runner(some, on_result=lambda request, unit: ended.append(request.checking.target))
    killer.join()
    assert [unit.findings[0].code for unit in units] == ["GC101"] * 8
    assert sorted(ended) == [f"missing{n}.py" for n in range(8)]
    soon(lambda: not marked(processes.scratch))
    soon(lambda: all(each.pid for each in processes.workers.values()))


@linux
@pytest.mark.slow
def test_a_model_that_kills_its_worker_is_crashed_and_no_other(processes, tmp_path):
    (tmp_path / "kills.py").write_text("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nmodel = None\n")
    some = requests(*(tmp_path / name for name in ("a.py", "kills.py", "b.py", "c.py")))
    with connected(processes.scheduler_address, tmp_path, some) as runner:
        units = runner(some)
    assert [unit.findings[0].code for unit in units] == ["GC101", "GC801", "GC101", "GC101"]
    assert [unit.status for unit in units] == ["error", "crashed", "error", "error"]


@pytest.mark.slow
@pytest.mark.parametrize("address", ["local", "processes"])
def test_samples_have_the_verdicts_that_they_have_without_dask(processes, tmp_path, monkeypatch, address):
    for name in ("linear.py", "wrong_backward.py", "straight_through.py"):
        shutil.copy(SAMPLES / name, tmp_path)
    # Dask's nanny sets these for its workers.
    asks = "import os\nraise ValueError([os.environ.get(n) for n in ('OMP_NUM_THREADS', 'PYTHONHASHSEED')])\n"
    (tmp_path / "variables.py").write_text(f"{asks}def make_model(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    project = Project(tmp_path / "gradctl.toml", Configuration())
    planned = plan(project, select_entries(project, ()), forms=("eager", "export"))
    here = run(planned, jobs=2)
    assert {unit.verdict for unit in here} == {"pass", "fail", "inconclusive"}
    address = processes.scheduler_address if address == "processes" else "local"
    requests = [each.request for each in planned]
    with cluster_runner(address, project, requests, jobs=2, say=lambda text: None) as runner:
        there = run(planned, runner=runner)
    assert without_times(there) == without_times(here)


@pytest.mark.slow
def test_all_samples_have_the_verdicts_that_they_have_without_dask(tmp_path):
    reports = []
    for options in ([], ["--dask", "local"]):
        file = tmp_path / f"{len(reports)}.json"
        command = [sys.executable, "-m", "gradctl", "check", SAMPLES, "--form", "eager", "--report", f"json={file}"]
        subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, check=False)
        units = json.loads(file.read_text())["units"]
        reports.append([(each["target"], each["form"], each["verdict"], each["reason"]) for each in units])
    assert len(reports[0]) > 10
    assert reports[0] == reports[1]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_supervisor_that_is_killed_is_resumed_and_loses_nothing(tmp_path, seed):
    lines = (f'[[targets]]\ntarget = "missing{n}.py"\nforms = ["eager"]\n' for n in range(10))
    (tmp_path / "gradctl.toml").write_text("".join(lines))
    command = ["check", "--jobs", "2", "--dask", "local", "--report", "json=report.json"]
    with subprocess.Popen(
        [sys.executable, "-m", "gradctl", *command], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as first:
        journal = tmp_path / "report.json.journal"
        soon(lambda: journal.exists() and b'"type":"start"' in journal.read_bytes())
        time.sleep(random.Random(seed).uniform(0, 2))
        first.kill()
    ended = {line for line in journal.read_bytes().splitlines(keepends=True) if line.startswith(b'{"type":"end"')}
    finished = gradctl(*command, "--resume", cwd=tmp_path, fresh=True)
    assert finished.returncode == 4, finished.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [unit["target"] for unit in report["units"]] == [f"missing{n}.py" for n in range(10)]
    assert finished.stderr.count("eager: inconclusive") == 10 - sum(line.endswith(b"\n") for line in ended)
