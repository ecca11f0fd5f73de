"""Closed lists of names, and a bound, that ``--help`` and the report contract share. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, get_args

# Of a time limit: more does not fit into the milliseconds of poll(2).
LONGEST_SECONDS = 1e6

RuntimeForm = Literal[
    "openvino", "openvino-joint", "executorch", "executorch-joint"
]  # of packages that are installed on request
FormName = Literal[
    "eager", "trace", "script", "export", "aot", "compile", "onnx", "export-joint", "onnx-joint", RuntimeForm
]
FORMS: tuple[str, ...] = get_args(FormName)
RUNTIME_FORMS: tuple[str, ...] = get_args(RuntimeForm)

# The model on 2 to 8 ranks: DistributedDataParallel, FSDP2, tensor parallelism, or as the target's file arranges it.
RankFormName = Literal[
    "ddp:2",
    "ddp:3",
    "ddp:4",
    "ddp:5",
    "ddp:6",
    "ddp:7",
    "ddp:8",
    "fsdp:2",
    "fsdp:3",
    "fsdp:4",
    "fsdp:5",
    "fsdp:6",
    "fsdp:7",
    "fsdp:8",
    "tp:2",
    "tp:3",
    "tp:4",
    "tp:5",
    "tp:6",
    "tp:7",
    "tp:8",
    "ranks:2",
    "ranks:3",
    "ranks:4",
    "ranks:5",
    "ranks:6",
    "ranks:7",
    "ranks:8",
]
RANK_FORMS: tuple[str, ...] = get_args(RankFormName)
RANK_FORMS_TEXT = "ddp:N, fsdp:N, tp:N, ranks:N (N ranks, 2 to 8)"

# Compared if no form is named: a joint graph is for those who want gradients outside PyTorch.
DEFAULT_FORMS: tuple[str, ...] = tuple(
    name for name in FORMS if not name.endswith("-joint") and name not in RUNTIME_FORMS
)

# What ``gradctl check`` compares with a snapshot is a unit beside those of the forms.
UnitForm = Literal[FormName, RankFormName, "snapshot"]
SNAPSHOT: UnitForm = "snapshot"
SNAPSHOT_SUFFIX = ".snapshot"
_MOST_CHARACTERS = 120  # of the name of a snapshot's file

WITHOUT_GRADIENTS: tuple[str, ...] = ("onnx", "openvino", "executorch")
# Compilers and runtimes that can hang or crash: these forms run in a process of their own, under a time limit.
# ``gradctl check`` gives every unit one; the Python API has no way to send a model to another process.
NEEDS_PROCESS: tuple[str, ...] = ("compile", "onnx", "onnx-joint", *RUNTIME_FORMS)

# A variable of OpenMP, and its value: by default threads spin at the end of each parallel loop, and take the cores from
# the processes beside them. On 2 busy cores the eager runs of a small GPT took 7 s of CPU instead of 0.7 s.
PASSIVE_WAIT = ("OMP_WAIT_POLICY", "PASSIVE")

# Optimizers of ``compare --steps``; the first is the default.
OPTIMIZERS: tuple[str, ...] = ("adamw", "adam", "sgd")
# Variants of the training step, with the default of their argument (``accumulate:2``); None: they take none.
VARIANTS: dict[str, str | None] = {
    "compile": None,
    "compile-step": None,
    "accumulate": "2",
    "checkpoint": None,
    "checkpoint-reentrant": None,
    "amp": "bf16",
    "foreach": None,
    "fused": None,
    "lora": "4",
    "resume": None,
    "ddp": "2",
    "fsdp": "2",
    "tp": "2",
    "ranks": "2",
}
# Those of them that are compared only if they are named: they start processes for their ranks.
VARIANTS_OF_RANKS: tuple[str, ...] = ("ddp", "fsdp", "tp", "ranks")
# A variable of CUDA: with a GPU autograd starts threads, and ranks cannot be forked from a process that has them.
NO_GPU = ("CUDA_VISIBLE_DEVICES", "")
# Those of them that run in a process of their own, under a time limit.
VARIANTS_IN_PROCESS: tuple[str, ...] = ("compile", "compile-step")

FORMATS = ("console", "json", "jsonl", "markdown", "junit", "github", "html", "gitlab", "sarif")

# The short dtype names of ``--input 'x=f32[8,784]'``; values are attribute names of torch.
DTYPES = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "c64": "complex64",
    "c128": "complex128",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "bool": "bool",
}

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[str, ...] = get_args(Severity)  # worst first
Quantity = Literal["output", "gradient", "buffer"]
Component = Literal["real", "imag"]
UnitStatus = Literal["complete", "unsupported", "error", "timeout", "crashed"]
UnitVerdict = Literal["pass", "fail", "inconclusive", "skipped"]
VERDICTS: tuple[str, ...] = get_args(UnitVerdict)
TensorVerdict = Literal[
    "same",
    "non-differentiable",
    "approximate",
    "less-accurate",
    "wrong",
    "reference-wrong",
    "differs",
    "missing",
    "unresolved",
    "nondeterministic",
    # NOT_JUDGED
    "frozen",
    "no-gradient",
    "too-small",
    "behind-hook",
]
# Counted apart from what agrees; none of them fails a unit or makes it inconclusive.
NOT_JUDGED: tuple[TensorVerdict, ...] = ("frozen", "no-gradient", "too-small", "behind-hook")


def parameter_name(qualified_name: str) -> str:
    """Return the report's name of a parameter, for example ``param:fc1.weight``."""
    return f"param:{qualified_name}"


def buffer_name(qualified_name: str) -> str:
    """Return the report's name of a buffer, for example ``buffer:bn.running_mean``."""
    return f"buffer:{qualified_name}"


def input_name(path: str) -> str:
    """Return the report's name of an input leaf by its pytree path, for example ``input:batch.mask``."""
    return f"input:{path}"


def output_name(path: str) -> str:
    """Return the report's name of an output leaf: ``output``, or ``output.logits`` for a nested one."""
    return f"output.{path}" if path else "output"


def snapshot_name(title: str) -> str:
    """Return the file name of a snapshot for the title of a target or a test, which depends on the title alone.

    A title whose characters do not all stand in a file name, or in which case distinguishes names (``net.py:Model``),
    has a part of its digest at the end: two titles have two names, also on file systems that ignore case.
    """
    text = title.replace("/", "~").replace(":", "@")
    name = re.sub(r"[^\w.\-\[\]+=,~@]+", "-", text, flags=re.ASCII)[:_MOST_CHARACTERS]
    is_exact = name == text and not re.search("[~@]", title)
    has_case = re.search(r"[@\[].*[A-Z]", name) is not None
    digest = "" if is_exact and not has_case else f".{hashlib.sha256(title.encode()).hexdigest()[:8]}"
    return f"{name}{digest}{SNAPSHOT_SUFFIX}"
