"""One description of the options of a target, and everything that is made from it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import click
import pytest

from gradctl import api
from gradctl.cli.main import cli
from gradctl.cli.options import target_options
from gradctl.core.target_options import DEFAULTS, OPTIONS, TargetOptions
from gradctl.suite.configuration import Configuration, TargetEntry


def test_every_field_but_the_target_and_the_command_is_described():
    assert [each.name for each in fields(TargetOptions)] == ["target", *OPTIONS, "command"]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_on_the_command_line_and_a_key_of_the_configuration(name):
    def gradcheck(checking):
        return checking

    command = click.command(target_options(gradcheck))
    (option,) = (each for each in command.params if each.name == name)
    assert "/".join([*option.opts, *option.secondary_opts]) == OPTIONS[name].flag
    assert OPTIONS[name].key in TargetEntry.__struct_fields__
    assert (OPTIONS[name].key in Configuration.__struct_fields__) == OPTIONS[name].is_shared


@pytest.mark.parametrize("check", [api.gradcheck, api.compare, api.export])
def test_python_has_the_same_defaults(check):
    parameters = inspect.signature(check).parameters
    assert {name: parameters[name].default for name in DEFAULTS if name in parameters}.items() <= DEFAULTS.items()


@pytest.mark.parametrize(
    ("name", "has_sizes"), [("gradcheck", True), ("compare", True), ("trace", False), ("inspect", False)]
)
def test_an_option_may_belong_to_some_commands(name, has_sizes):
    parameters = {each.name for each in cli.get_command(click.Context(cli), name).params}
    assert ({"sizes", "max_sizes"} & parameters == {"sizes", "max_sizes"}) == has_sizes
    assert {name for name, each in OPTIONS.items() if not each.commands} <= parameters
