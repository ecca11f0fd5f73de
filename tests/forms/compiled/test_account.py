"""Dynamo's account: graph breaks and recompilations by line, and nothing of a model that has none."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from gradctl.forms.compiled import aot
from gradctl.forms.compiled.account import graph_breaks, recompilations
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.subject.torch_private import clear_compilation_metrics


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.sum() > 100:  # a branch
            y = y / 2
        return y.relu()


class Looping(nn.Linear):
    def forward(self, x):
        for _ in range(2):
            x = super().forward(x)
            torch._dynamo.graph_break()  # in a loop
        return x


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1  # a counter
        return super().forward(x) / self.calls


def line_of(model, text):
    lines, start = inspect.getsourcelines(type(model).forward)
    return start + next(number for number, line in enumerate(lines) if text in line)


def instance_of(model, rows=2):
    subject = Subject(target="test", model=model, args=(torch.ones(rows, 4),))
    return Instance(subject, input_mode="constant", keep_hooks=True)


def called_again(model, *sizes):
    """Return what is compiled again in calls on inputs of so many rows, after the capture on 2."""
    clear_compilation_metrics()
    captured = aot.capture(instance_of(model))
    for rows in sizes:
        captured.call(torch.ones(rows, 4))
    return recompilations()


def test_a_graph_break_has_the_line_of_the_branch():
    found = graph_breaks(instance_of(model := Branching(4, 4)))
    assert [each.place for each in found.breaks] == [(__file__, line_of(model, "a branch"))]
    assert found.operators == 4  # linear, sum and its comparison in the first graph; relu in the second


def test_a_function_that_is_left_to_python_has_its_reason_and_a_line_in_it():
    (found,) = graph_breaks(instance_of(model := Looping(4, 4))).breaks
    assert "graph_break" in found.reason
    assert found.place[0] == __file__
    assert line_of(model, "def forward") <= found.place[1] <= line_of(model, "return")


def test_a_model_in_one_graph_has_no_break():
    found = graph_breaks(instance_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    assert (found.breaks, found.operators) == ((), 2)


def test_another_size_compiles_again_where_the_function_begins():
    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    (found,) = called_again(model := Plain(4, 4), 2, 5, 7)  # after the second size it is symbolic
    assert "size mismatch at index 0. expected 2, actual 5" in found.reason
    assert found.place == (__file__, line_of(model, "def forward"))


def test_a_counter_compiles_again_at_its_line_until_dynamo_stops():
    found = called_again(model := Counting(), *[2] * 12)
    assert {each.place for each in found} == {(__file__, line_of(model, "a counter"))}
    assert [each.is_refused for each in found] == [False] * 7 + [True]
    assert found[0].reason == "self.calls == 0"


def test_equal_calls_compile_nothing_again():
    assert called_again(nn.Linear(4, 4), 2, 2) == []
