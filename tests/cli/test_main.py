"""The one boundary: every exception has its exit code and its words, and nothing else reaches the terminal."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import click
import pytest

from gradctl import __version__
from gradctl.cli.main import COMMANDS, cli, run
from gradctl.core.errors import NothingToCheck, ResourceError, TargetError
from gradctl.core.target_options import OPTIONS
from tests.cli.command_line import gradctl


def outcome(monkeypatch, capsys, error):
    """Return exit code and stderr of a command that raises ``error``."""

    @click.command("doctor")
    def raising():
        raise error

    monkeypatch.setattr("gradctl.cli.commands.doctor.doctor", raising)
    exit_code = run(["doctor"])
    captured = capsys.readouterr()
    assert captured.out == ""
    return exit_code, captured.err


def test_help_lists_every_command_with_its_line():
    finished = gradctl("--help")
    assert finished.returncode == 0
    shown = " ".join(finished.stdout.split())
    for name, (_, line) in COMMANDS.items():
        assert f" {name} {line} " in shown
    assert finished.stdout.endswith("  Example:\n    gradctl gradcheck sample_models/mlp.py\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_table_is_how_the_help_of_a_command_begins(name):
    command = cli.get_command(click.Context(cli), name)
    assert " ".join(command.help.split()).startswith(COMMANDS[name][1])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_ends_in_an_example_of_it(name, capsys):
    assert run([name, "--help"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"    gradctl {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_the_exit_codes(name, capsys):
    assert run([name, "--help"]) == 0
    codes = capsys.readouterr().out.partition("\nExit codes:\n")[2].partition("\n\n")[0].splitlines()
    expected = {"init": "0 2 3 5", **dict.fromkeys(["snapshot", "inspect", "explain", "doctor"], "0 2 3")}
    assert [line.split()[0] for line in codes] == expected.get(name, "0 1 2 3 4 5 130").split()


@pytest.mark.parametrize(
    ("name", "headings"),
    [
        ("gradcheck", ["Target", "Inputs", "What to check", "Output", "Other options"]),
        (
            "compare",
            [
                *("Target", "Inputs", "Another implementation", "Training steps", "What to check", "Output"),
                "Other options",
            ],
        ),
        ("trace", ["Target", "Inputs", "What to capture", "What to check", "Output", "Other options"]),
        (
            "export",
            ["Target", "Inputs", "Training steps", "What to capture", "What to check", "Output", "Other options"],
        ),
        ("optimize", ["Target", "Inputs", "Passes", "What to check", "Output", "Other options"]),
        ("report", ["Output", "Other options"]),
        ("doctor", ["Output", "Other options"]),
        ("explain", ["Other options"]),
    ],
)
def test_the_options_of_a_command_are_in_groups(name, headings, capsys):
    assert run([name, "--help"]) == 0
    shown = re.findall(r"^(\w.*):$", capsys.readouterr().out, re.MULTILINE)
    assert shown == [*headings, "Exit codes"]


def test_an_option_of_a_target_is_in_the_group_that_the_table_names(capsys):
    assert run(["gradcheck", "--help"]) == 0
    screen = capsys.readouterr().out
    for option in OPTIONS.values():
        group = screen.partition(f"\n{option.heading}:\n")[2].partition("\n\n")[0]
        assert option.flag.replace("/", " / ") in group


def test_the_version():
    finished = gradctl("--version")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"gradctl {__version__}\n", "")


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_has_set_a_policy(tmp_path, monkeypatch, given, policy):
    model = tmp_path / "net.py"
    model.write_text("import os\n\ndef net(x):\n    raise ValueError(os.environ['OMP_WAIT_POLICY'])\n")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    finished = gradctl("gradcheck", f"{model}:net", "--input", "x=f32[2]", fresh=True, **given)
    assert f"ValueError: {policy}." in finished.stderr


def test_no_command_is_a_usage_error_that_shows_the_help():
    finished = gradctl()
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "Commands:\n  gradcheck " in finished.stderr


def test_a_misspelt_command_names_the_nearest():
    finished = gradctl("gradchek")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "Usage: gradctl [OPTIONS] COMMAND [ARGS]...\nTry 'gradctl --help'.\n\n"
        "Error: unknown command 'gradchek' (did you mean 'gradcheck'?). "
        "Commands: gradcheck, compare, bench, snapshot, verify, trace, export, optimize, check, init, inspect, "
        "report, explain, doctor.\n"
    )


def test_an_unknown_option_is_a_usage_error_of_its_command():
    finished = gradctl("explain", "--fast")
    assert finished.returncode == 2
    assert finished.stderr == (
        "Usage: gradctl explain [OPTIONS] [CODE|WORD...]\nTry 'gradctl explain --help'.\n\n"
        "Error: No such option '--fast'.\n"
    )


def test_an_error_of_ours_is_its_code_its_sentence_and_the_users_frames(monkeypatch, capsys):
    error = TargetError("GC104", "input 'x' has no dtype.", details='  File "net.py", line 3, in forward\n')
    assert outcome(monkeypatch, capsys, error) == (
        2,
        "GC104 input 'x' has no dtype.\n  File \"net.py\", line 3, in forward\n",
    )


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (NothingToCheck("GC110", "…"), 5),
        (ResourceError("GC803", "…"), 4),
        (ResourceError("GC131", "…", exit_code=2), 2),
    ],
)
def test_an_error_of_ours_has_its_own_exit_code(monkeypatch, capsys, error, exit_code):
    assert outcome(monkeypatch, capsys, error) == (exit_code, f"{error.code} …\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_130(monkeypatch, capsys, error):
    exit_code, said = outcome(monkeypatch, capsys, error)
    assert (exit_code, said.strip()) == (130, "interrupted")


def test_running_out_of_memory_is_inconclusive(monkeypatch, capsys):
    exit_code, said = outcome(monkeypatch, capsys, MemoryError())
    assert exit_code == 4
    assert said == (
        "GC803 out of memory: MemoryError. Use a smaller batch (it runs the same code), or free memory and run again.\n"
    )


def test_a_refusal_of_torchs_allocator_is_out_of_memory(capsys, monkeypatch):
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**46)
    exit_code, said = outcome(monkeypatch, capsys, raised.value)
    assert exit_code == 4
    assert said.startswith("GC803 out of memory: ")
    assert "you tried to allocate 281474976710656 bytes" in said
    assert len(said.splitlines()) == 1


def test_an_out_of_memory_error_of_a_device_is_out_of_memory(monkeypatch, capsys):
    import torch

    exit_code, said = outcome(monkeypatch, capsys, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"))
    assert exit_code == 4
    assert said.startswith("GC803 out of memory: CUDA out of memory. Tried 2 GiB. Use a smaller batch")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), SystemExit(1), RuntimeError("size mismatch")])
def test_anything_else_is_our_fault_and_says_where_to_report_it(monkeypatch, capsys, error):
    exit_code, said = outcome(monkeypatch, capsys, error)
    assert exit_code == 3
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith(
        f"internal error of gradctl ({type(error).__name__}): please report it with this traceback and the output of "
        "'gradctl doctor'.\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["explain"], ["explain", "GC401"]])
def test_a_reader_that_leaves_early_is_no_failure(arguments):
    read_end, write_end = os.pipe()
    os.close(read_end)
    finished = subprocess.run(
        [sys.executable, "-m", "gradctl", *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion_script(shell):
    finished = gradctl(_GRADCTL_COMPLETE=f"{shell}_source")
    assert finished.returncode == 0, finished.stderr
    assert f"_GRADCTL_COMPLETE={shell}_complete" in finished.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", "-c", finished.stdout], check=False).returncode == 0


def test_an_unknown_shell_is_a_usage_error():
    finished = gradctl(_GRADCTL_COMPLETE="tcsh_source")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "Error: unknown _GRADCTL_COMPLETE=tcsh_source. Use bash_source, zsh_source or fish_source.\n"
    )
