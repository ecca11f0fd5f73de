"""Forward and backward: the joint graph in onnxruntime and OpenVINO against torch eager and inductor, in one run.

    python tests/benchmarks/joint_speed.py [NAME…] [--threads 2] [--seconds 20] [--profile]

A call returns the outputs and the gradients of all parameters, for one cotangent. Both runtimes run the file as it is
exported, onnxruntime with all optimisations, OpenVINO (if it is installed) in float32; their feeds are made before. All
take turns, call by call; times are of the fastest call and of the median one, in milliseconds, and as a ratio to eager
in the same run. With ``--threads 1`` they are CPU times, which other processes disturb less. ``error`` is the largest
relative error of a gradient in a runtime against eager's, of the largest entry of each.

``export`` is the seconds of the joint export, and in multiples of the forward ONNX export of the same model.
``--profile`` prints which operators the time of the graph goes to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from gradctl.core.names import output_name
from gradctl.forms.onnx import forward as onnx
from gradctl.forms.onnx import joint as onnx_joint
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves
from tests.zoo.transformers import built

RUNTIMES = ("onnxruntime", "OpenVINO")  # of the graph
Inputs = tuple[Tensor, ...]
Gradients = dict[str, Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 convolution where the size changes."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(given, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.second, self.second_norm = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and given == width
        self.beside = nn.Identity() if same else nn.Conv2d(given, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.beside(x))


class Pooled(nn.Module):
    """The mean over all positions of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def residual() -> tuple[nn.Module, Inputs]:
    """Return a residual net of 0.7 million parameters, norms in evaluation mode."""
    stages = [Block(32, 32, 1), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2)]
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(stem, *stages, Block(128, 128, 1), Pooled(), nn.Linear(128, 10)), (torch.randn(8, 3, 64, 64),)


def mlp() -> tuple[nn.Module, Inputs]:
    """Return 784-1024-1024-10, batch 64."""
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), (torch.randn(64, 784),)


def encoder() -> tuple[nn.Module, Inputs]:
    """Return 4 layers, 256 wide, batch 8 of 128 positions."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (torch.randn(8, 128, 256),)


def gru() -> tuple[nn.Module, Inputs]:
    """Return a GRU of 128 units, batch 16 of 32 steps."""
    return nn.GRU(64, 128, batch_first=True), (torch.randn(16, 32, 64),)


def small() -> tuple[nn.Module, Inputs]:
    """Return two strided convolutions and a linear layer, batch 16 of 28 x 28."""
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 7 * 7, 10)), (torch.randn(16, 1, 28, 28),)


def llama() -> tuple[nn.Module, Inputs]:
    """Return a Llama of 4 layers, 128 wide, batch 4 of 64 positions."""
    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return built("LlamaForCausalLM", "LlamaConfig", **sizes, **heads), (torch.randint(2, 1000, (4, 64)),)


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "residual": residual,
    "mlp": mlp,
    "encoder": encoder,
    "gru": gru,
    "small": small,
    "llama": llama,
}


def tensors_of(value: Any) -> dict[str, Tensor]:
    """Return the tensors of an output, by name."""
    return {output_name(path): leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor)}


def stepping(model: nn.Module, call: Callable[..., Any], inputs: Inputs, cotangents: Gradients) -> Callable[[], Any]:
    """Return a call of torch: outputs, and gradients of all parameters."""
    parameters = dict(model.named_parameters())

    def step() -> Gradients:
        outputs = tensors_of(call(*inputs))
        given = [cotangents[f"grad_{name}"] for name in outputs]
        found = torch.autograd.grad(list(outputs.values()), list(parameters.values()), given)
        return dict(zip(parameters, found, strict=True))

    return step


def session_of(path: Path, threads: int, *, profile: bool = False) -> onnxruntime.InferenceSession:
    """Return a session of a file with all optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = profile
    options.profile_file_prefix = str(path.with_suffix(""))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def running(session: onnxruntime.InferenceSession, values: dict[str, Tensor]) -> Callable[[], Gradients]:
    """Return a call of a session whose feeds are made already."""
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    feeds = {each.name: make(values[each.name].detach().numpy()) for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]

    def call() -> Gradients:
        found = session.run_with_ort_values(names, feeds)
        return {name: torch.from_dlpack(each) for name, each in zip(names, found, strict=True)}

    return call


def in_openvino(path: Path, threads: int, values: dict[str, Tensor]) -> Callable[[], Gradients]:
    """Return a call of a file in OpenVINO whose feeds are made already."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        array = values[port.any_name].detach().contiguous().numpy()
        request.set_tensor(port.any_name, openvino.Tensor(array, shared_memory=True))
    names = [port.any_name for port in compiled.outputs]

    def call() -> Gradients:
        request.infer(share_outputs=True)
        return {name: torch.from_numpy(request.get_tensor(name).data) for name in names}

    return call


def turns(calls: dict[str, Callable[[], Any]], threads: int, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each call, taken in turns until the time is over; on one thread, those of the CPU."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for call in calls.values():
        for _ in range(3):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(1000 * (clock() - start))
    return taken


def print_profile(path: Path, threads: int, values: dict[str, Tensor]) -> None:
    """Print the milliseconds of a run by operator, those of most first."""
    session = session_of(path, threads, profile=True)
    call = running(session, values)
    runs = 20
    for _ in range(runs):
        call()
    spent: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    print("  " + ", ".join(f"{name} {us / 1000 / runs:.2f}" for name, us in spent.most_common(12)), flush=True)


def one_model(name: str, threads: int, seconds: float, profile: bool, folder: Path) -> None:
    """Print one row of the table."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval() if name == "residual" else model.train()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    instance = Instance(Subject(target=name, model=model, args=inputs), keep_hooks=True)
    start = time.perf_counter()
    onnx.export_graph(instance)
    forward = time.perf_counter() - start
    joint = onnx_joint.export_graph(instance, wrt=("param:*",))
    path = folder / f"{name}.onnx"
    ir.save(joint.artifact, path)
    cotangents = {f"grad_{each}": torch.randn_like(value) for each, value in tensors_of(model(*inputs)).items()}
    session = session_of(path, threads)
    given = [each.name for each in session.get_inputs() if each.name.startswith("input.")]
    values = {**values, **cotangents, **dict(zip(given, inputs, strict=True))}
    compiled = torch.compile(model)
    calls = {
        "eager": stepping(model, model, inputs, cotangents),
        "inductor": stepping(model, compiled, inputs, cotangents),
        "onnxruntime": running(session, values),
    }
    if importlib.util.find_spec("openvino") is not None:
        try:
            calls["OpenVINO"] = in_openvino(path, threads, values)
        except RuntimeError as error:  # it has no conversion for Scan with a state (2026.4)
            print(f"{name}: OpenVINO refuses the file: {str(error).strip().splitlines()[-1]}")
    truth = calls["eager"]()
    found = [calls[each]() for each in RUNTIMES if each in calls]
    error = max(
        float((each[f"grad.{name}"] - want).abs().max() / want.abs().max())
        for each in found
        for name, want in truth.items()
        if float(want.abs().max()) > 1e-4
    )
    taken = turns(calls, threads, seconds)
    for what, of in (("fastest", min), ("median", statistics.median)):
        figures = {each: of(times) for each, times in taken.items()}
        ratios = "".join(f"{each:>9.3f}ms {each / figures['eager']:>5.2f}" for each in figures.values())
        rest = f"{error:>9.1e} {joint.seconds:>6.1f} s {joint.seconds / forward:>5.1f}" if what == "fastest" else ""
        print(f"{name:<10}{what:<8}{ratios}{rest}", flush=True)
    if profile:
        print_profile(path, threads, values)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {given.threads} threads")
    head = "".join(f"{each:>11} {'ratio':>5}" for each in ("eager", "inductor", *RUNTIMES))
    print(f"{'':<18}{head}{'error':>9} {'export':>8} {'times':>5}")
    linear = Instance(Subject(target="first", model=nn.Linear(1, 1), args=(torch.ones(1, 1),)), keep_hooks=True)
    onnx_joint.export_graph(linear)  # what is imported and registered once is in no time of a model
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or MODELS:
            one_model(name, given.threads, given.seconds, given.profile, Path(folder))


if __name__ == "__main__":
    main()
