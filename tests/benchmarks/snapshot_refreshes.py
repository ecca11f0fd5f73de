"""Do snapshots hold? Taken once, verified under other versions of torch, threads and CPU capabilities.

    python tests/benchmarks/snapshot_refreshes.py [--python PYTHON…] [--planted 100] [TARGET…]

Snapshots of the sample models and of 24 small models of transformers are taken with this Python, and verified with each
PYTHON on one thread and on two, with and without vector instructions. Printed: the snapshots that would have to be
rewritten (none), the largest change in units of the noise of one ULP, the size of the text, and how many of the planted
changes are found: a relative change of 1e-4 in one gradient.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLANTED = 1.0001
SAMPLES = (
    *("attention.py:reference", "attention.py:fused", "control_flow.py", "custom_operator.py", "custom_relu.py:ReLU"),
    *("forces.py", "gradient_reversal.py", "gru.py", "linear.py", "mlp.py", "no_grad_inside.py", "resnet.py"),
    *("row_blocks.py", "straight_through.py", "straight_through_detach.py", "tied_weights.py", "transformer.py"),
    *("triton_kernel.py", "wrong_backward.py"),
)
TYPES = (
    *("albert", "bart", "bert", "bloom", "codegen", "deberta-v2", "distilbert", "electra", "falcon", "gemma", "gpt2"),
    *("gpt_neo", "gpt_neox", "llama", "mamba", "mistral", "mixtral", "opt", "phi", "qwen2", "roberta", "t5", "vit"),
    "whisper",
)


def targets() -> list[str]:
    """Return all targets, relative to the root of the repository."""
    return [*(f"sample_models/{name}" for name in SAMPLES), *(f"hf:{name}" for name in TYPES)]


def file_of(folder: Path, target: str) -> Path:
    """Return the path of the snapshot of a target."""
    return folder / f"{target.replace('/', '_').replace(':', '_')}.snapshot"


def take(folder: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Take a snapshot of each target, and yield its size."""
    from gradctl.core.errors import GradctlError
    from gradctl.core.target_options import TargetOptions
    from gradctl.snapshots.take_snapshot import take_snapshot
    from gradctl.subject.loading.load import load_subject

    for name in names:
        options = TargetOptions(name, input_specs=("f32[8,16]",) if name.endswith(":ReLU") else ())
        start = time.perf_counter()
        try:
            taken = take_snapshot(load_subject(options), file_of(folder, name), options=options)
        except GradctlError as error:
            yield {"target": name, "refused": str(error)}
            continue
        lines = taken.path.read_bytes().splitlines()
        longest = max(len(line) for line in lines if line.startswith(b'{"line":"tensor"'))
        yield {
            "target": name,
            "tensors": len(taken.content.tensors),
            "bytes": taken.text_bytes,
            "longest": longest,
            "seconds": round(time.perf_counter() - start, 1),
            "float64": taken.content.header.float64_error is None,
        }


def verify(folder: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Verify each snapshot here, and yield the verdict and the largest changes."""
    from gradctl.snapshots import verify_snapshot as module

    seen: list[Any] = []
    compare_runs = module.compare_runs

    def observed(*arguments: Any) -> Any:
        seen[:] = compare_runs(*arguments)
        return seen

    module.compare_runs = observed
    for name in names:
        unit = module.verify_snapshot(file_of(folder, name))
        moved = [each for each in seen if each.difference]
        noisy = [(each.difference / each.stored.noise, each.key[1]) for each in moved if each.stored.noise]
        quiet = [(each.error, each.key[1]) for each in moved if not each.stored.noise]
        yield {
            "target": name,
            "verdict": unit.verdict,
            "findings": [f"{each.code} {each.message}" for each in unit.findings if each.severity != "note"],
            "other_values": any(each.code == "GC315" for each in unit.findings),
            "tensors": len(seen),
            "moved": len(moved),
            "of_tolerance": max(((each.severity, each.key[1]) for each in moved), default=(0.0, "")),
            "of_noise": max(noisy, default=(0.0, "")),
            "without_noise": max(quiet, default=(0.0, "")),
        }


def plant(folder: Path, names: list[str], count: int) -> Iterator[dict[str, Any]]:
    """Scale the gradient of one parameter at a time, and yield whether it is found, and nothing else."""
    import torch

    from gradctl.snapshots.changes import Limits
    from gradctl.snapshots.snapshot_file import read
    from gradctl.snapshots.verify_snapshot import options_of, verify_snapshot
    from gradctl.subject.loading.load import load_subject
    from gradctl.subject.signature import parameters_of

    places = []
    for name in names:
        content = read(file_of(folder, name))
        cancelled = Limits(content.tensors, content.header).cancelled
        places += [
            (name, each.name)
            for each in content.tensors
            if each.quantity == "gradient"
            and each.name.startswith("param:")
            and each.native is not None
            and (each.float64 or each.native).norm > 0
            and (each.quantity, each.name) not in cancelled
        ]
    for name, tensor in random.Random(0).sample(places, min(count, len(places))):
        path = file_of(folder, name)
        subject = load_subject(options_of(read(path).header, path))
        parameter = parameters_of(subject.model).get(tensor.removeprefix("param:"))
        if parameter is None:
            continue
        assert isinstance(parameter, torch.Tensor)
        parameter.register_hook(lambda gradient: gradient * PLANTED)
        unit = verify_snapshot(path, subject)
        found = [each.tensor for each in unit.findings if each.severity == "error"]
        yield {"target": name, "tensor": tensor, "found": found == [tensor], "named": found}


def worker(python: str, what: str, folder: Path, names: list[str], **environment: str) -> list[dict[str, Any]]:
    """Return what a process of its own prints for each target."""
    command = [python, __file__, "--worker", what, "--folder", str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return rows


def main() -> None:
    """Print a table for each configuration, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PYTHON", help="Another Python to verify with."
    )
    parser.add_argument("--planted", type=int, default=100, metavar="N", help="Changes to plant.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.targets or targets()
    if arguments.worker:
        run = {"take": take, "verify": verify}.get(arguments.worker)
        rows = run(arguments.folder, names) if run else plant(arguments.folder, names, int(arguments.worker))
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        _report(arguments.folder or Path(temporary), names, [sys.executable, *arguments.python], arguments.planted)


def _report(folder: Path, names: list[str], pythons: list[str], planted: int) -> None:
    taken = worker(sys.executable, "take", folder, names)
    for row in taken:
        print(
            row.get("refused")
            or f"{row['target']:<40} {row['tensors']:4} tensors {row['bytes']:8} bytes "
            f"(longest line {row['longest']}) {row['seconds']} s{'' if row['float64'] else '  NO FLOAT64'}"
        )
    held = [row["target"] for row in taken if "refused" not in row]
    total = sum(row["tensors"] for row in taken if "refused" not in row)
    size = sum(row.get("bytes", 0) for row in taken) / max(total, 1)
    print(f"{len(held)} snapshots, {total} tensors, {size:.0f} bytes a tensor")
    refreshes = 0
    for python, threads, capability in itertools.product(pythons, ("1", "2"), ("", "default")):
        environment = {"OMP_NUM_THREADS": threads, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})}
        rows = worker(python, "verify", folder, held, **environment)
        failed = [row for row in rows if row["verdict"] != "pass"]
        refreshes += len(failed) + len(held) - len(rows)
        print(
            f"\n{python} threads={threads} capability={capability or 'native'}: {len(rows)} verified, "
            f"{len(failed)} to refresh, {sum(row['other_values'] for row in rows)} with other values, "
            f"{sum(row['moved'] for row in rows)} of {sum(row['tensors'] for row in rows)} tensors not bit-equal"
        )
        for key in ("of_tolerance", "of_noise", "without_noise"):
            worst = sorted(((*row[key], row["target"]) for row in rows), reverse=True)[:3]
            print(f"  largest {key:<14}", "; ".join(f"{value:.3g} ({name}, {target})" for value, name, target in worst))
        for row in failed:
            print(f"  REFRESH {row['target']}: {row['verdict']} {row['findings'][:3]}")
    found = worker(sys.executable, str(planted), folder, held)
    missed = [row for row in found if not row["found"]]
    print(f"\nrefreshes: {refreshes}\nplanted: {len(found) - len(missed)} of {len(found)} found")
    for row in missed:
        print(f"  {row['target']} {row['tensor']}: named {row['named'][:3]}")


if __name__ == "__main__":
    main()
