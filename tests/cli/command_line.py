"""Running ``gradctl`` as a process, the way a person does."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cli.fork_server import MOST_BYTES

__all__ = ["gradctl", "run_module"]

TIMEOUT_SECONDS = 120
# What a fork may be told; any other variable may be read when Python starts, or torch is imported.
OF_FORKS = {"COLUMNS", "NO_COLOR", "OMP_NUM_THREADS"}


def gradctl(*arguments, cwd=None, fresh=False, **environment):
    """Return the finished process of ``gradctl ARGUMENTS``, with both streams as text.

    Args:
        arguments: its command line.
        cwd: its folder.
        fresh: start an interpreter of its own, where the imports or the seed of hashes matter.
        environment: variables that it has besides ours.
    """
    fresh = fresh or not set(environment) <= OF_FORKS
    return run_module("gradctl", [*map(str, arguments)], cwd, {**os.environ, **environment}, fresh=fresh)


def run_module(module, arguments, cwd, environment, *, fresh=False):
    """Return the finished process of ``python -m MODULE ARGUMENTS``, forked unless it is to be ``fresh``."""
    if fresh or sys.platform != "linux":
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    request = {"module": module, "arguments": arguments, "environment": environment}
    request["folder"] = str(Path(cwd or ".").absolute())
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        server, channel = fork_server()
        socket.send_fds(channel, [json.dumps(request).encode()], [output.fileno(), errors.fileno()])
        try:
            exit_status = json.loads(channel.recv(MOST_BYTES))
        except TimeoutError:
            os.killpg(server.pid, signal.SIGKILL)
            fork_server.cache_clear()
            raise
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess([module, *arguments], exit_status, *texts)


@functools.cache
def fork_server():
    """Return the process that forks, which ends with this one, and the socket that it reads from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(TIMEOUT_SECONDS)
    command = [sys.executable, "-m", "tests.cli.fork_server", str(theirs.fileno())]
    root = Path(__file__).parents[2]
    server = subprocess.Popen(command, cwd=root, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return server, ours
