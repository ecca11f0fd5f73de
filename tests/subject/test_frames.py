from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import traceback

import pytest
import torch
from torch import nn

import gradctl.api
import gradctl.cli
from gradctl.core.errors import is_out_of_memory
from gradctl.subject.frames import first_line, keep_user_frames, user_frames, user_location
from gradctl.subject.loading.arguments import call_with


class Asking(nn.Module):
    """Asks, deep in torch's frames, where it was called from."""

    def forward(self, x):
        self.place = here_line(), user_location()
        return x


def here_line():
    return __file__, inspect.currentframe().f_back.f_lineno


def test_the_location_is_the_line_that_asks_where_that_is_the_users():
    assert user_location() == here_line()


def test_the_location_is_in_the_users_module_under_torchs_frames():
    model = nn.Sequential(nn.Sequential(Asking()))
    model(torch.ones(1))
    expected, found = model[0][0].place
    assert found == expected


def test_frames_of_the_standard_library_are_passed_over():
    class Probe:
        ask = staticmethod(user_location)
        __copy__ = operator.methodcaller("ask")  # so that the frame that asks is one of copy.py

    assert copy.copy(Probe()) == here_line()


def test_other_libraries_count_as_the_users(tmp_path):
    file = tmp_path / "site-packages" / "some_library.py"
    code = compile("place = ask()\n", str(file), "exec")
    scope = {"ask": user_location}
    exec(code, scope)
    assert scope["place"] == (str(file), 1)


def test_generated_code_has_no_location_of_its_own():
    @dataclasses.dataclass
    class Probe:
        place: object = dataclasses.field(default_factory=user_location)  # called by a generated __init__

    assert Probe().place == here_line()


@pytest.mark.parametrize("entrance", [gradctl.cli, gradctl.api], ids=lambda entrance: entrance.__name__)
def test_who_calls_gradctl_itself_is_nobodys_model(entrance):
    scope = {"ask": user_location}
    exec(compile("def main():\n    return ask()\n", entrance.__file__, "exec"), scope)
    assert scope["main"]() is None


def test_an_error_is_cut_to_the_users_frames_and_so_is_what_it_was_raised_from():
    class Raising(nn.Module):
        def forward(self, x):
            try:
                torch.ones(2) @ torch.ones(3)
            except RuntimeError as error:
                raise KeyError("width") from error

    def frames(error):
        return [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]

    with pytest.raises(KeyError) as caught:
        nn.Sequential(Raising())(torch.ones(1))
    own = [(__file__, Raising.forward.__name__)]
    assert len(frames(caught.value)) > 4
    cut = keep_user_frames(caught.value)
    assert cut is caught.value
    assert frames(cut) == [
        (__file__, test_an_error_is_cut_to_the_users_frames_and_so_is_what_it_was_raised_from.__name__),
        *own,
    ]
    assert frames(cut.__cause__) == own


def test_an_error_without_a_frame_of_the_users_is_cut_to_nothing():
    error = RuntimeError("torch's")
    exec(compile("def fails(error):\n    raise error\n", torch.__file__, "exec"), scope := {})
    try:
        scope["fails"](error)
    except RuntimeError:
        error.__traceback__ = error.__traceback__.tb_next
    assert keep_user_frames(error) is None
    assert keep_user_frames(None) is None


def test_the_frames_of_an_error_are_the_users():
    def fails(width):
        return nn.Linear(4, width)(torch.ones(2, 3))

    with pytest.raises(Exception) as caught:
        call_with(fails, "fails", {"width": 2})
    shown = user_frames(caught.value.__cause__)
    assert shown.startswith(f'Traceback (most recent call last):\n  File "{__file__}", line ')
    assert shown.count("  File ") == 1
    assert shown.endswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x2)")


def test_an_error_that_was_raised_from_another_shows_both():
    def fails():
        try:
            {}["large"]
        except KeyError as error:
            raise ValueError("no such size") from error

    with pytest.raises(ValueError) as caught:
        fails()
    shown = user_frames(caught.value)
    assert shown.index("KeyError: 'large'") < shown.index("direct cause") < shown.index("ValueError: no such size")


def test_an_error_without_a_frame_of_the_users_shows_its_text():
    assert user_frames(ValueError("no frames")) == "ValueError: no frames"


def test_an_error_that_never_ends_is_shown_in_brief():
    def endless():
        return endless()

    with pytest.raises(RecursionError) as caught:
        endless()
    assert len(user_frames(caught.value).splitlines()) < 30


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("width must be even.\nIt is 3."), "ValueError: width must be even"),
        (ValueError("\n  first\nsecond"), "ValueError: first"),
        (ValueError(), "ValueError"),
        (KeyError("large"), "KeyError: 'large'"),
        (ValueError("one of these:\n a"), "ValueError: one of these"),
        (TypeError("no source of <function f at 0x7f1b00ab>."), "TypeError: no source of <function f>"),
        (
            RuntimeError(
                "no forward on class: __torch__.m.___torch_mangle_3.Net (of Python compilation unit at: 0x55f)"
            ),
            "RuntimeError: no forward on class: m.Net",
        ),
        (SyntaxError("invalid syntax", ("/home/net.py", 3, 1, "x")), "SyntaxError: invalid syntax (net.py, line 3)"),
    ],
)
def test_the_first_line_of_an_error_names_its_type(error, line):
    assert first_line(error) == line


def test_what_a_script_raises_is_said_by_its_own_words():
    def fails(x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            raise ValueError("too large")
        return x.reshape(5)

    scripted = torch.jit.script(fails)
    said = {}
    for sign in (1, -1):
        with pytest.raises(torch.jit.Error if sign > 0 else RuntimeError) as caught:
            scripted(sign * torch.ones(3))
        said[sign] = first_line(caught.value)
    assert said == {1: "ValueError: too large", -1: "RuntimeError: shape '[5]' is invalid for input of size 3"}


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
