"""What `gradctl optimize` gains, and what its verification costs, on sample models and tiny transformers, in one run.

    python tests/benchmarks/optimize.py [NAME…] [--level default]

Nodes: before, after, and what onnxscript, onnxruntime basic and onnxslim (where it is installed) make of the same file
by themselves (`!` for a graph that onnxruntime cannot load). Latency: medians under onnxruntime with all optimisations,
all of these graphs in turn, as a part of the exported one's; "of best" is the fastest single tool. Cost: seconds
of holding each pass against the graph before it, against those of the passes and two runs of the model (sessions
included). The first runs of the graph, the last comparison and the timing itself are not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import onnx

from gradctl.checks.file_inputs import drawn_to_run
from gradctl.checks.file_latency import latencies
from gradctl.checks.optimize import Options, optimize_target
from gradctl.checks.verified_graph import stored
from gradctl.core.errors import TargetError
from gradctl.core.findings import format_number
from gradctl.forms.onnx_file import nodes, read, session
from gradctl.forms.onnx_session import run
from gradctl.passes.table import PASSES, of_level
from gradctl.subject.load import load_subject
from gradctl.subject.subject import Subject
from tests.zoo.transformers import TRANSFORMERS

SAMPLES = ("linear", "mlp", "resnet", "transformer", "gru", "tied_weights", "no_grad_inside", "straight_through")
ZOO = ("bert-masked", "distilbert", "gpt2", "llama", "t5", "vit", "swin", "convnext", "clip", "whisper")
TOOLS = ("onnxscript", "ort-basic", "slim")
SECONDS = 3.0


def subject_of(name: str) -> Subject:
    """Return a sample model, or a tiny transformer."""
    if name in SAMPLES:
        return load_subject(str(Path(__file__).parents[2] / "sample_models" / f"{name}.py"))
    model, args, kwargs = TRANSFORMERS[name]()
    return Subject(target=name, model=model, args=args, kwargs=kwargs)


def count(model: onnx.ModelProto) -> int:
    """Return the nodes of a graph, those of subgraphs and functions too."""
    return sum(1 for _ in nodes(model))


def two_runs(path: Path) -> float:
    """Return the seconds of a session and a run of it, twice."""
    file = read(path)
    feeds = drawn_to_run(file, 0)
    start = time.perf_counter()
    for _ in range(2):
        run(session(file, optimised=False), feeds)
    return time.perf_counter() - start


def one_model(name: str, level: str, folder: Path) -> None:
    """Print one row of the table."""
    exported, output = folder / "exported.onnx", folder / "optimized.onnx"
    assert optimize_target(subject_of(name), exported, Options([])).written
    optimized = optimize_target(subject_of(name), output, Options(of_level(level), level=level))
    table = optimized.unit.optimization
    if table is None or not optimized.written:
        print(f"{name:<17} {optimized.unit.verdict}: {[each.message for each in optimized.unit.findings]}", flush=True)
        return
    files, made, unusable = [read(exported), read(output)], {}, set()
    for tool in TOOLS:
        if PASSES[tool].missing():
            continue
        file = stored(PASSES[tool].apply(files[0].model), folder / f"{tool}.onnx")
        try:
            session(file)
        except TargetError:
            unusable.add(tool)
        else:
            made[tool] = len(files)
            files.append(file)
    taken = [each.median for each in latencies(files, drawn_to_run(files[0], 0), seconds=SECONDS)]
    marks = {tool: "!" if tool in unusable else "-" for tool in TOOLS}
    shown = [f"{count(files[made[tool]].model) if tool in made else marks[tool]:>10}" for tool in TOOLS]
    best = min(taken[place] for place in made.values())
    verification = sum(each.verification_seconds for each in table.passes)
    passes = sum(each.seconds for each in table.passes) + two_runs(exported)
    print(
        f"{name:<17}{table.before.nodes:>7}{table.after.nodes:>7}{''.join(shown)}{taken[1] / taken[0]:>9.3f}"
        f"{best / taken[0]:>9.3f}{format_number(table.error):>10}{format_number(table.budget):>10}"
        f"{verification / passes:>8.2f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*SAMPLES, *ZOO])
    parser.add_argument("--level", default="default", choices=["safe", "default", "max"])
    options = parser.parse_args()
    headings = "".join(f"{tool:>10}" for tool in TOOLS)
    numbers = f"{'latency':>9}{'of best':>9}{'error':>10}{'budget':>10}{'cost':>8}"
    print(f"{'model':<17}{'before':>7}{'after':>7}{headings}{numbers}")
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            one_model(name, options.level, Path(folder))


if __name__ == "__main__":
    main()
