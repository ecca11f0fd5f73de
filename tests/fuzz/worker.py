"""Runs command lines of gradctl in one process, a request a line: what a mutated file does to it is seen from outside.

A request is a JSON list of arguments, the answer an exit code; what is said on stderr lies in that file.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import sys
from pathlib import Path

import onnxruntime  # noqa: F401  # what the limit is measured after
import onnxscript  # noqa: F401
import torch

from gradctl.cli.main import run

__all__ = ["ADDITIONAL_BYTES"]

# What one command may take beyond what the libraries take when they are loaded; the files have some kilobytes.
ADDITIONAL_BYTES = 2**30


def main(requests: int, answers: int) -> None:
    """Answer requests until there are no more.

    Args:
        requests: the descriptor of a pipe to read them from.
        answers: that of a pipe to write answers to.
    """
    torch.set_num_threads(1)
    run(["doctor"])
    virtual = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDITIONAL_BYTES,) * 2)
    with os.fdopen(requests) as asked, os.fdopen(answers, "w") as said:
        for line in asked:
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            print(json.dumps(code), file=said, flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    main(int(sys.argv[1]), int(sys.argv[2]))
