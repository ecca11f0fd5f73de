"""When Triton's interpreter is switched on; what it does is in tests/cases/test_triton_kernels.py."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

import pytest
import torch

from gradctl.subject.loading import triton_interpreter
from gradctl.subject.loading.triton_interpreter import VARIABLE, interpreter_refusal, switch_on_interpreter


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes a machine with or without triton and a GPU."""

    def make(*, installed=True, imported=False, gpu=False, variable=None):
        spec = importlib.machinery.ModuleSpec("triton", None) if installed else None
        monkeypatch.setattr(triton_interpreter.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.delitem(sys.modules, "triton", raising=False)
        if imported:
            monkeypatch.setitem(sys.modules, "triton", importlib.util.module_from_spec(spec))
        monkeypatch.setenv(VARIABLE, variable or "")
        if variable is None:
            monkeypatch.delenv(VARIABLE)

    return make


def test_it_is_switched_on_where_kernels_have_no_gpu(machine):
    machine()
    switch_on_interpreter()
    assert os.environ[VARIABLE] == "1"


@pytest.mark.parametrize("state", [{"installed": False}, {"imported": True}, {"gpu": True}], ids=str)
def test_it_is_left_off_where_it_is_not_needed_or_too_late(machine, state):
    machine(**state)
    switch_on_interpreter()
    assert VARIABLE not in os.environ


def test_what_the_user_set_stays(machine):
    machine(variable="0")
    switch_on_interpreter()
    assert os.environ[VARIABLE] == "0"


def test_an_error_of_the_users_own_is_not_the_interpreters():
    assert interpreter_refusal(RuntimeError("shapes do not match")) is None


def test_a_kernel_without_a_gpu_and_interpreter_says_what_to_set():
    refusal = interpreter_refusal(RuntimeError("0 active drivers ([]). There should only be one."))
    assert str(refusal) == (
        "GC127 a Triton kernel found no GPU, and TRITON_INTERPRET=1 was not set when triton was imported. Set "
        "TRITON_INTERPRET=1 in the environment: Triton's interpreter then runs the kernels on the CPU."
    )
    assert refusal.exit_code == 4
