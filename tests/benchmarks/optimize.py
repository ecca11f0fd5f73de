"""What `gradctl optimize` gains, and what its verification costs, on sample models and tiny transformers, in one run.

    python tests/benchmarks/optimize.py [NAME…] [--level default]
    python tests/benchmarks/optimize.py --memory [--megabytes 256]

Nodes: before, after, and what onnxscript, onnxruntime basic and onnxslim (where it is installed) make of the same file
by themselves (`!` for a graph that onnxruntime cannot load).

Latency: under onnxruntime with all optimisations, as a ratio, with the half width of its 95 % interval. A repetition
makes new sessions of all these graphs in an order drawn anew and runs them in turn; a ratio is the geometric mean over
repetitions of that of the medians. "of before" is to the graph as it was exported; "of best" to the single tool that is
fastest in the other half of the repetitions, since the least of three is less than each by luck alone; "of itself" to
the same file once more, which is what no difference looks like.

Cost: seconds of all that verifies (the runs of the graph before the passes, the comparison after each, that of the
result), against those of the passes and of two runs of the model, a session each. "measuring" is the seconds of the
latencies in the report.

Memory: the most that optimising a chain of MatMul, Add and Relu takes, in sizes of its file, beyond what the process
has before: all of it, by what it does at the time (a pass is run and verified), and each pass by itself.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gradctl.commands.optimize import Options, optimize_file, optimize_target
from gradctl.comparison.file_inputs import draw_inputs
from gradctl.comparison.timing import latencies
from gradctl.comparison.verified_graph import VerifiedGraph, store
from gradctl.core.errors import TargetError
from gradctl.core.numbers import format_number
from gradctl.core.target_options import TargetOptions
from gradctl.onnxio.onnx_file import OnnxFile, read, session
from gradctl.onnxio.session import run
from gradctl.onnxio.validation import nodes
from gradctl.passes import pipeline
from gradctl.passes.table import PASSES, passes_of_level
from gradctl.subject.loading.load import load_subject
from gradctl.subject.subject import Subject
from tests.zoo.transformers import TRANSFORMERS

SAMPLES = ("linear", "mlp", "resnet", "transformer", "gru", "tied_weights", "no_grad_inside", "straight_through")
ZOO = ("bert-masked", "distilbert", "gpt2", "llama", "t5", "vit", "swin", "convnext", "clip", "whisper")
TOOLS = ("onnxscript", "ort-basic", "slim")
REPETITIONS = 16
SECONDS_EACH = 0.4
STUDENT_95 = 2.2  # at 11 degrees of freedom; 2.13 at 15, 2.36 at 7


def subject_of(name: str) -> Subject:
    """Return a sample model, or a tiny transformer."""
    if name in SAMPLES:
        return load_subject(TargetOptions(str(Path(__file__).parents[2] / "sample_models" / f"{name}.py")))
    model, args, kwargs = TRANSFORMERS[name]()
    return Subject(target=name, model=model, args=args, kwargs=kwargs)


def count(model: onnx.ModelProto) -> int:
    """Return the nodes of a graph, those of subgraphs and functions too."""
    return sum(1 for _ in nodes(model))


def two_runs(path: Path) -> float:
    """Return the seconds of a session and a run of it, twice."""
    file = read(path)
    feeds = draw_inputs(file, 0)
    start = time.perf_counter()
    for _ in range(2):
        run(session(file, optimised=False), feeds)
    return time.perf_counter() - start


class Stopwatch:
    """Seconds spent in some functions, each replaced where it is looked up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Count what ``owner.name`` takes from now on."""
        watched: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(watched)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return watched(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def log_medians(files: dict[str, OnnxFile]) -> dict[str, list[float]]:
    """Return the logarithm of the median of each graph, repetition by repetition."""
    feeds = draw_inputs(files["before"], 0)
    order, draw = list(files), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(REPETITIONS):
        draw.shuffle(order)
        for name, latency in zip(order, latencies([files[k] for k in order], feeds, seconds=SECONDS_EACH), strict=True):
            found[name].append(math.log(latency.median))
    return found


def ratio(mine: Sequence[float], other: Sequence[float]) -> str:
    """Return the geometric mean of the ratios, and the half width of its 95 % interval."""
    pairs = [a - b for a, b in zip(mine, other, strict=True)]
    half = STUDENT_95 * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{math.exp(statistics.mean(pairs)):>8.3f} ±{half:.3f}"


def best_tool(taken: dict[str, list[float]], made: Sequence[str]) -> list[float]:
    """Return for each repetition what the tool took that is fastest in the repetitions of the other parity."""
    best = [min(made, key=lambda tool: statistics.mean(taken[tool][1 - parity :: 2])) for parity in (0, 1)]
    return [taken[best[k % 2]][k] for k in range(REPETITIONS)]


def one_model(name: str, level: str, folder: Path, verifying: Stopwatch, measuring: Stopwatch) -> None:
    """Print one row of the table."""
    exported, output = folder / "exported.onnx", folder / "optimized.onnx"
    assert optimize_target(subject_of(name), exported, Options([])).written
    verifying.seconds = measuring.seconds = 0.0
    optimized = optimize_target(subject_of(name), output, Options(passes_of_level(level), level=level))
    verification, measured = verifying.seconds, measuring.seconds
    table = optimized.unit.optimization
    if table is None or not optimized.written:
        print(f"{name:<17} {optimized.unit.verdict}: {[each.message for each in optimized.unit.findings]}", flush=True)
        return
    files = {"before": read(exported), "after": read(output), "again": read(output)}
    marks = dict.fromkeys(TOOLS, "-")
    for tool in TOOLS:
        if PASSES[tool].missing():
            continue
        file = store(PASSES[tool].apply(files["before"].model), folder / f"{tool}.onnx")
        try:
            session(file)
        except TargetError:
            marks[tool] = "!"
        else:
            files[tool], marks[tool] = file, str(count(file.model))
    taken = log_medians(files)
    passes = sum(each.seconds for each in table.passes) + two_runs(exported)
    print(
        f"{name:<17}{table.before.nodes:>7}{table.after.nodes:>7}{''.join(f'{marks[tool]:>11}' for tool in TOOLS)}"
        f"{ratio(taken['after'], taken['before']):>16}"
        f"{ratio(taken['after'], best_tool(taken, [tool for tool in TOOLS if tool in files])):>16}"
        f"{ratio(taken['after'], taken['again']):>16}"
        f"{format_number(table.error):>10}{format_number(table.budget):>10}{verification / passes:>7.2f}"
        f"{measured:>11.1f}",
        flush=True,
    )


def the_table(names: Sequence[str], level: str) -> None:
    """Print nodes, latencies and costs."""
    verifying, measuring = Stopwatch(), Stopwatch()
    for method in ("__init__", "differences", "total_differences"):
        verifying.watch(VerifiedGraph, method)
    verifying.watch(pipeline, "shelve")
    verifying.watch(pipeline, "first_change")
    measuring.watch(pipeline, "latencies")
    headings = "".join(f"{tool:>11}" for tool in TOOLS)
    ratios = "".join(f"{heading:>16}" for heading in ("of before", "of best", "of itself"))
    print(
        f"{'model':<17}{'before':>7}{'after':>7}{headings}{ratios}{'error':>10}{'budget':>10}{'cost':>7}{'measuring':>11}"
    )
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            one_model(name, level, Path(folder), verifying, measuring)


def chain(path: Path, megabytes: int) -> None:
    """Write a graph of four products, its weights in it."""
    width, draw = math.isqrt(megabytes * 2**20 // 16), np.random.default_rng(0)
    text = "".join(
        f"m{k} = MatMul({f'r{k - 1}' if k else 'x'}, w{k}) a{k} = Add(m{k}, b{k}) r{k} = Relu(a{k}) " for k in range(4)
    ).replace("r3 =", "y =")
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[4, {width}] x) => (float[4, {width}] y) {{ {text} }}'
    )
    for k in range(4):
        weight = draw.standard_normal((width, width), dtype=np.float32) / np.float32(math.sqrt(width))
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{k}"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(draw.standard_normal(width).astype("f4"), f"b{k}"))
    onnx.save(model, path)


class Peak:
    """The most memory since the last reset, of this process."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.base = self._status("VmRSS")

    def reset(self) -> None:
        """Begin anew."""
        Path("/proc/self/clear_refs").write_text("5")

    def models(self) -> float:
        """Return it in models, beyond what there was at first."""
        return (self._status("VmHWM") - self.base) / self.unit

    def _status(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def memory_of(path: Path, level: str, alone: str) -> None:
    """Print the peaks of this process: of optimising a file, step by step, or of one pass by itself."""
    small = path.with_name("small.onnx")
    chain(small, 1)
    if alone:
        PASSES[alone].apply(onnx.load(small))  # what a package takes is no model
        peak = Peak(path.stat().st_size)
        PASSES[alone].apply(onnx.load(path))
        print(f"{alone + ' alone':<40}{peak.models():>8.2f}", flush=True)
        return
    optimize_file(small, path.with_name("optimized.onnx"), Options(passes_of_level(level), level=level))
    peak, steps = Peak(path.stat().st_size), ["reading the file"]

    def next_step(text: str) -> None:
        print(f"{steps[-1]:<40}{peak.models():>8.2f}", flush=True)
        peak.reset()
        steps.append(text)

    optimize_file(
        path, path.with_name("optimized.onnx"), Options(passes_of_level(level), level=level, progress=next_step)
    )
    next_step("")


def the_memory(level: str, megabytes: int) -> None:
    """Print what optimising takes, and the passes by themselves, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        chain(path, megabytes)
        print(f"{f'a file of {path.stat().st_size / 2**20:.0f} MiB':<40}{'models':>8}", flush=True)
        for alone in ("", *(each.name for each in passes_of_level(level) if not each.missing())):
            command = [sys.executable, __file__, "--level", level, "--of-file", str(path), f"--alone={alone}"]
            subprocess.run(command, check=True)


def main() -> None:
    """Print the table, or the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*SAMPLES, *ZOO])
    parser.add_argument("--level", default="default", choices=["safe", "default", "max"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--of-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of_file:
        memory_of(options.of_file, options.level, options.alone)
    elif options.memory:
        the_memory(options.level, options.megabytes)
    else:
        the_table(options.names, options.level)


if __name__ == "__main__":
    main()
