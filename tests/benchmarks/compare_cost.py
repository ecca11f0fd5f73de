"""What `gradctl compare` costs beside the bare captures and compilations, in one run.

    python tests/benchmarks/compare_cost.py [--without-compile]

Each side runs in a fresh process, imports counted: the bare one captures sample_models/mlp.py in each form once, and
runs it forward and backward once where it has gradients.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORMS = ("trace", "script", "export", "aot", "onnx", "compile")
BARE = """
import sys, torch, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
sys.path.insert(0, "sample_models")
import mlp
def fresh():
    return mlp.make_model(), mlp.example_inputs()
def train(call, args):
    call(*[a.clone().requires_grad_() for a in args]).sum().backward()
for form in sys.argv[1:]:
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
"""


def seconds(command: list[str]) -> float:
    """Return the wall time of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-compile", action="store_true")
    forms = [form for form in FORMS if form != "compile" or not parser.parse_args().without_compile]
    options = [word for form in forms for word in ("--form", form)]
    # inductor keeps what it compiled on disk: both sides start without.
    fresh = [sys.executable, "-c", "import os, sys; os.environ['TORCHINDUCTOR_FORCE_DISABLE_CACHES'] = '1'; "
             "import subprocess; sys.exit(subprocess.call(sys.argv[1:]))", sys.executable]  # fmt: skip
    bare = seconds([*fresh, "-c", BARE, *forms])
    ours = seconds([*fresh, "-m", "gradctl", "compare", "sample_models/mlp.py", *options])
    print(f"forms {', '.join(forms)}: bare {bare:.1f} s, gradctl compare {ours:.1f} s, ratio {ours / bare:.2f}")


if __name__ == "__main__":
    main()
