"""Reports to render: one of each kind that a person meets."""

from __future__ import annotations

from msgspec.structs import replace

from gradctl.core.findings import (
    Allowance,
    Element,
    Finding,
    Location,
    Oracle,
    Report,
    TensorResult,
    Tool,
    Unit,
    fingerprint,
)
from gradctl.core.names import DEFAULT_FORMS
from gradctl.core.verdicts import run_verdict, summarise

__all__ = ["crashed", "gradient", "many", "passing", "report_of", "spoiled", "unit", "whole_run", "wrong_weight"]


def gradient(tensor, verdict="same", shape=(4, 3), **numbers):
    return TensorResult(quantity="gradient", tensor=tensor, verdict=verdict, shape=shape, dtype="float32", **numbers)


def unit(verdict, tensors=(), findings=(), form="eager", **more):
    return Unit(
        target=more.pop("target", "net.py:make_model"),
        form=form,
        verdict=verdict,
        tensors=tuple(tensors),
        findings=tuple(findings),
        **more,
    )


def report_of(*units, command="gradcheck", allows=(), status="complete", planned=None):
    verdicts = [each.verdict for each in units]
    return Report(
        tool=Tool(version="0.1.0"),
        command=command,
        status=status,
        verdict=run_verdict(verdicts),
        planned=planned,
        seed=0,
        environment={"python": "3.11.7", "torch": "2.13.0", "threads": 2, "onnx": None},
        units=units,
        allows=tuple(Allowance(allow=allow, applied=applied) for allow, applied in allows),
        summary=summarise(verdicts),
    )


def passing():
    oracle = Oracle(dtype="float64", noise=1e-16, forwards=69, probes=3, missed_with_probability=6e-5)
    names = ("param:fc1.weight", "param:fc1.bias", "param:fc2.weight", "param:fc2.bias", "input:x", "input:y")
    return report_of(unit("pass", [gradient(name) for name in names], oracle=oracle, seconds=0.25))


def wrong_weight():
    worst = (
        Element(
            index=(2, 0),
            reference=-0.418,
            finite_difference=-1.07,
            absolute_error=0.652,
            relative_error=0.609,
        ),
        Element(index=(0, 1), reference=0.0, finite_difference="nan", absolute_error="nan"),
    )
    weight = gradient("param:fc1.weight", "reference-wrong", error=0.621, budget=3.1e-7, elements_wrong=12, worst=worst)
    finding = Finding(
        code="GC401",
        severity="error",
        message="autograd's gradient of param:fc1.weight is off by 62 %.",
        hint="Check the backward of fc1.",
        quantity="gradient",
        tensor="param:fc1.weight",
        verdict="reference-wrong",
        allow="GC401:param:fc1.weight",
        location=Location(file="net.py", line=12, module="fc1"),
        fingerprint=fingerprint("GC401", "net.py:make_model", "eager", "gradient", "param:fc1.weight"),
    )
    note = Finding(
        code="GC404",
        severity="note",
        message="detach is held fixed.",
        location=Location(file="net.py", line=20),
    )
    tensors = [gradient("param:fc1.bias"), weight, gradient("param:fc2.bias")]
    return report_of(unit("fail", tensors, [note, finding]))


def spoiled(count=2, allowed=False):
    """A wrong Function, and the gradients before it, which are wrong because of it and of nothing else."""
    named = Finding(
        code="GC408",
        severity="error",
        message="LeakyReLU.backward is not the derivative of its forward.",
        allow="GC408:LeakyReLU",
        allowed=allowed,
        location=Location(file="net.py", line=14, module="act"),
    )
    tensors = [gradient("param:last.bias")]
    findings = [named]
    if not allowed:
        for index in range(count):
            name = f"param:layers.{index}.weight"
            worst = (Element(index=(0, index), reference=1.0, finite_difference=2.0, absolute_error=1.0),)
            tensors.append(gradient(name, "reference-wrong", error=0.5 + index, budget=1e-7, worst=worst))
            findings.append(
                Finding(code="GC401", cause="GC408", severity="error", message=f"{name} is off.", tensor=name)
            )
    verdict = "pass" if allowed else "fail"
    return report_of(unit(verdict, tensors, findings), allows=[("GC408:LeakyReLU", True)] if allowed else [])


def crashed():
    found = Finding(code="GC801", severity="error", message="the process died of signal 11.")
    return report_of(
        unit(
            "inconclusive",
            status="crashed",
            reason="the process died of signal 11 (SIGSEGV)",
            details="Fatal Python error\x1b[31m: Segmentation fault",
            findings=[found],
        )
    )


def whole_run(status="complete"):
    """Three targets: one that fails, one that is expected to, one that crashes; all skip what script refuses."""
    (wrong,) = wrong_weight().units
    (crash,) = crashed().units
    refused = {"form": "script", "status": "unsupported", "reason": "torch.jit.script refuses **kwargs"}
    held = Finding(code="GC404", severity="note", message="detach is held fixed.")
    dropped = Finding(code="GC402", severity="error", message="x is off.", allowed=True, tensor="input:x")
    stale = Finding(code="GC150", severity="note", message="--allow GC408:Round accepts nothing.")
    lost = gradient("input:x", "wrong", error=0.5, budget=1e-7)
    return report_of(
        replace(wrong, target="models/vision/net.py:make_model"),
        unit("skipped", target="models/vision/net.py:make_model", **refused),
        unit("pass", [gradient("input:x")], [held], target="models/ste.py:make_model"),
        unit("pass", [lost], [dropped, stale], target="models/ste.py:make_model", form="export", expected="fail"),
        unit("skipped", target="models/ste.py:make_model", **refused),
        replace(crash, target="models/old.py:Net", form="trace"),
        command="check",
        status=status,
    )


def many(units, tensors, fails=lambda index: index % 9 == 4):
    """Return a report of many targets in seven forms, with long paths; units that ``fails`` names have all wrong."""
    return report_of(*(_one_of_many(index, tensors, fails(index)) for index in range(units)), command="check")


def _one_of_many(index, tensors, fails):
    number, form = divmod(index, len(DEFAULT_FORMS))
    place = {"target": f"packages/vision/models/group_{number % 5}/a_long_folder_name/network_{number}.py:make_model"}
    place["form"] = DEFAULT_FORMS[form]
    names = [f"param:layers.{layer}.weight" for layer in range(tensors)]
    if not fails:
        note = Finding(code="GC404", severity="note", message="detach is held fixed.")
        return unit("pass", [gradient(name, error=1e-8, budget=1e-7) for name in names], [note], **place)
    numbers = {"reference": 1.0, "candidate": 2.0, "finite_difference": 1.0, "absolute_error": 1.0}
    worst = tuple(Element(index=(0, column), **numbers) for column in range(5))
    wrong = [gradient(name, "wrong", error=0.5, budget=1e-7, elements_wrong=5, worst=worst) for name in names]
    findings = [
        Finding(
            code="GC402",
            severity="error",
            message=f"the gradient of {name} is off by 5.00e-01 of its norm, with a budget of 1.00e-07.",
            hint="the form computes something else: see the module.",
            tensor=name,
            allow=f"GC402:{name}",
            location=Location(file="net.py", line=12, module=name),
        )
        for name in names
    ]
    return unit("fail", wrong, findings, **place)
