"""What ``gradctl compare`` costs beside the bare captures and compilations, in one run.

    python tests/benchmarks/compare_cost.py [MODEL.py ...] [--without-compile]

Both sides use the same two processes: the forms that run in gradctl's own process, and those that need another
(``compile``, ``onnx``), imports counted. The bare side captures the model in each form once, and runs it forward and
backward once if it has gradients. Without a MODEL: the MLP, transformer and ResNet of ``sample_models``, and a GPT of
four blocks of width 64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = (
    "sample_models/mlp.py",
    "sample_models/transformer.py",
    "tests/benchmarks/models/gpt.py",
    "sample_models/resnet.py",
)
OWN_PROCESS, OTHER_PROCESS = ("trace", "script", "export", "aot"), ("compile", "onnx")
BARE = """
import contextlib, sys, pathlib, torch, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
path = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(path.parent))
model_file = __import__(path.stem)
def fresh():
    return model_file.make_model(), model_file.example_inputs()
def train(call, args):
    call(*[a.clone().requires_grad_(a.is_floating_point()) for a in args]).sum().backward()
def run(form):
    model, args = fresh()
    if form == "trace": train(torch.jit.trace(model, args), args)
    if form == "script": train(torch.jit.script(model), args)
    if form == "export": train(torch.export.export(model, args).module(), args)
    if form == "aot": torch._dynamo.reset(); train(torch.compile(model, backend="aot_eager"), args)
    if form == "compile": torch._dynamo.reset(); train(torch.compile(model), args)
    if form == "onnx":
        import onnxruntime
        program = torch.onnx.export(model, args, dynamo=True, verbose=False)
        onnxruntime.InferenceSession(program.model_proto.SerializeToString())
for form in sys.argv[2:]:
    with contextlib.suppress(Exception):  # a form that rejects the model; gradctl skips it
        run(form)
"""


def seconds(*commands: Sequence[str]) -> float:
    """Return the wall time of commands that run side by side, in seconds."""
    with tempfile.TemporaryDirectory() as cache:  # empty, as on a first run: inductor keeps on disk what it compiles
        start = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for command in commands
        ]
        codes = [process.wait() for process in processes]
        taken = time.perf_counter() - start
    assert set(codes) <= {0, 1, 4}, f"exit codes {codes}"  # 1: gradctl has found something; 4: a form is rejected
    return taken


def main() -> None:
    """Print both sides and their ratio, for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--without-compile", action="store_true")
    arguments = parser.parse_args()
    other = [form for form in OTHER_PROCESS if form != "compile" or not arguments.without_compile]
    options = ["--timeout", "3600", *(word for form in (*OWN_PROCESS, *other) for word in ("--form", form))]
    for model in arguments.models:
        bare = seconds(["-c", BARE, model, *OWN_PROCESS], ["-c", BARE, model, *other])
        ours = seconds(["-m", "gradctl", "compare", model, *options])
        print(f"{model}: bare {bare:.1f} s, gradctl compare {ours:.1f} s, ratio {ours / bare:.2f}", flush=True)


if __name__ == "__main__":
    main()
