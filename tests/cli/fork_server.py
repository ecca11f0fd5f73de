"""A process that has imported what the commands import, and forks once for each command line.

Two of the three seconds that a command takes are the imports of torch and onnx, and the tests run some 300 commands. A
fork has its own folder, environment and streams, and runs ``python -m MODULE`` to its end as any interpreter does.

``python -m tests.cli.fork_server FD`` reads requests from a socket: a JSON object, and the descriptors of both streams.
It answers each with its exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import logging
import os
import runpy
import socket
import sys
import threading
import warnings
from pathlib import Path

from tests.torchlib import share_conversions

__all__ = ["MOST_BYTES", "STREAMS"]

MOST_BYTES = 1 << 16
STREAMS = 2
IMPORTED = (
    *("torch", "torch.export._trace", "torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.codecache"),
    *("torch.onnx._internal.exporter._core", "networkx.algorithms.coloring.greedy_coloring"),
    *("onnx", "onnx_ir", "onnxscript.optimizer", "onnxscript.rewriter", "onnxscript.function_libs.torch_lib.ops"),
    *("gradctl.gradients.size_sweep", "gradctl.joint.capture", "gradctl.suite.plan", "gradctl.report.text.console"),
    *("gradctl.cli.commands.check", "gradctl.cli.commands.compare", "gradctl.cli.commands.export"),
    *("gradctl.comparison.trials", "gradctl.graphdiff.graph_changes", "gradctl.subject.loading.load"),
    *("gradctl.forms.exported.export_joint", "gradctl.forms.torchscript.torchscript_values", "gradctl.passes.opset"),
)


def import_all() -> None:
    """Import what the commands import when they are called, onnxruntime apart: it starts a thread, as no fork has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            with contextlib.suppress(ImportError):  # another version of torch may have moved it
                importlib.import_module(name)
        share_conversions()
        logging.disable(logging.WARNING)  # torch says which operators of torchvision it has not found
        with contextlib.suppress(ImportError, AttributeError):
            registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
            # Which operators decompose is asked without an opset; an export takes the table of its own.
            for opset in (None, importlib.import_module("torch.onnx._constants").ONNX_DEFAULT_OPSET):
                registry.from_torchlib(opset)
        logging.disable(logging.NOTSET)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork has only the thread that forks"


def serve(channel: socket.socket) -> str | None:
    """Answer requests until the socket is closed; in a fork, return the module that it is to run."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, MOST_BYTES, STREAMS)
        if not message:
            return None
        child = os.fork()
        if child == 0:
            channel.close()
            return become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        channel.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def become(request: dict, streams: list[int]) -> str:
    """Take the folder, the environment, the streams and the arguments of a request, and return its module."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        open(2, "wb", closefd=False),  # noqa: SIM115
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]  # as ``python -m`` has it
    sys.argv = [request["module"], *request["arguments"]]
    return request["module"]


def run(module: str) -> None:
    """Run a module to its end; what an interpreter does last, to free each object, costs more than a short command."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        exit_status = end.code or 0
    else:
        exit_status = 0
    threading._shutdown()  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)


if __name__ == "__main__":
    import_all()
    gc.freeze()  # else the first collection of each fork copies every page
    module = serve(socket.socket(fileno=int(sys.argv[1])))
    if module is not None:
        run(module)
