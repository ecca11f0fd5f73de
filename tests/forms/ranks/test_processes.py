"""Processes of ranks: they answer, their failures have words, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradctl.forms.ranks.collectives import CollectiveLog
from gradctl.forms.ranks.processes import RankFailed, RankProcesses
from gradctl.forms.silence import silenced
from tests.forms.ranks.models import small_net
from tests.isolation.faulty import is_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")


def test_ranks_answer_with_what_they_compute_together():
    def serve(rank):
        def answer(request):
            total = torch.full((2,), float(request))
            dist.all_reduce(total)
            return rank.number, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], total

        return answer

    with RankProcesses(3, serve) as ranks:
        for number, (rank, local, world, total) in enumerate(ranks.ask([1, 2, 3])):
            assert (rank, local, world, total.tolist()) == (number, str(number), "3", [6.0, 6.0])
        assert ranks.ask([0, 0, 1])[2][3].tolist() == [1.0, 1.0]


# What the handler of rank 1 does: kind and words of the failure.
FAILURES = {
    "raises": (lambda: 1 / 0, "raised", "rank 1 raises ZeroDivisionError: division by zero (test_processes.py, line "),
    "exits": (lambda: os._exit(0), "died", "rank 1 ended without an answer: os._exit(0) in "),
    "exits silenced": (lambda: silenced()(os._exit)(0), "died", "rank 1 ended without an answer: os._exit(0) in "),
    "ends Python": (lambda: sys.exit(3), "raised", "rank 1 raises SystemExit: 3"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "died", "rank 1 died of signal 9 (SIGKILL)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_rank_that_fails_is_named_and_not_the_others_whose_connections_break(case):
    act, kind, words = FAILURES[case]

    def serve(rank):
        def answer(request):
            if rank.number == 1:
                act()
            dist.all_reduce(torch.ones(1))

        return answer

    with RankProcesses(3, serve) as ranks, pytest.raises(RankFailed) as raised:
        ranks.ask([None] * 3)
    assert (raised.value.rank, raised.value.kind) == (1, kind)
    assert raised.value.reason.startswith(words)


def test_a_rank_that_computes_for_ever_ends_at_the_time_limit():
    def serve(rank):
        def answer(request):
            rank.note("counts")
            while rank.number == 0:
                pass

        return answer

    with RankProcesses(2, serve, seconds=2.0) as ranks, pytest.raises(RankFailed) as raised:
        ranks.ask([None] * 2)
    assert raised.value.kind == "late"
    assert raised.value.reason.startswith("no answer in 2 s: rank 0 counts (test_processes.py, line ")
    assert raised.value.reason.endswith("; rank 1 has finished")


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_nothing_is_left_of_ranks_that_answered_or_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def left_behind() -> tuple[set[str], int, list[Path]]:
        return children(), len(list(Path("/proc/self/fd").iterdir())), list(tmp_path.iterdir())

    def serve(rank):
        def answer(request):
            dist.all_reduce(torch.ones(1))
            return 1 / request

        return answer

    before = left_behind()
    for request in (1, 0, 1):
        with RankProcesses(2, serve) as ranks:
            try:
                ranks.ask([request] * 2)
            except RankFailed as failure:
                assert request == 0 and "ZeroDivisionError" in failure.reason
    assert left_behind() == before


def test_ranks_end_with_a_parent_that_is_killed():
    program = """
        import os, time
        from gradctl.forms.ranks.processes import RankProcesses
        with RankProcesses(2, lambda rank: lambda request: os.getpid()) as ranks:
            print(*ranks.ask([None] * 2), flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(each) for each in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    assert all(map(is_gone, pids))


def test_collectives_are_recorded_with_their_module_phase_and_line():
    class Gathers(torch.nn.Module):
        def forward(self, x):
            dist.all_reduce(x.detach())
            return x

    def serve(rank):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(small_net(), Gathers()).double())

        def answer(request):
            log = CollectiveLog(model.module, rank.note)
            with log, log.watch_modules():
                out = model(torch.ones(2, 4, dtype=torch.float64))
                log.phase = "backward"
                out.sum().backward()
            return log.found

        return answer

    with RankProcesses(2, serve) as ranks:
        first, *_, last = ranks.ask([None] * 2)[0]
    assert (first.name, first.phase, first.module, first.shape) == ("all_reduce", "forward", "1", (2, 3))
    assert first.place[0] == __file__
    assert (last.name, last.phase, last.shape) == ("all_reduce", "backward", (67,))  # DDP's bucket of all parameters


def test_a_process_in_which_autograd_has_threads_is_refused_with_what_to_do():
    """A deep backward inside a backward starts a thread, after which no forked process can run autograd."""
    code = """
import torch
from gradctl.commands.compare import compare_one
from tests.forms.ranks.models import averaging, subject_of

class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Deep.apply(x, ctx.depth - 1).backward()
        return cotangent, None

Deep.apply(torch.ones(1, requires_grad=True), 100).backward()
unit = compare_one(subject_of(parallelize=averaging()), "ranks:2", named=True, allows=())
print(unit.verdict, unit.reason)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.startswith("inconclusive autograd has started threads in this process"), ended.stderr
    assert "CUDA_VISIBLE_DEVICES" in ended.stdout
