"""What the user's operators register beside their kernels, tested by ``torch.library.opcheck``: GC424.

One call of each operator of the native model is tested: the schema, the autograd key, and the fake kernel. Its fourth
test, of AOTAutograd, compiles: ``gradctl compare`` does that. None of them looks at the numbers of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding, Location
from gradctl.core.names import Severity
from gradctl.gradients.baseline import Baseline, run_once
from gradctl.gradients.unjudged import ObservedInstance
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance
from gradctl.subject.torch_private import MetadataMismatchError, UnsupportedOperatorException
from gradctl.tracing.control_flow import plain_control_flow
from gradctl.tracing.custom_operators import OperatorCall, OperatorCalls, has_users_operators

_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def operator_findings(native: Baseline) -> list[Finding]:
    """Return what is wrong with the operators that the model calls, at the inputs of one call of each."""
    if not has_users_operators():
        return []
    watched, calls = ObservedInstance(Instance(native.subject, input_mode=native.input_mode)), OperatorCalls()
    try:
        with plain_control_flow(), calls:
            run_once(watched, native.subject)
    finally:
        watched.kept.put_back()
    return [finding for call in calls for finding in _contract_findings(call)]


def _contract_findings(call: OperatorCall) -> Iterator[Finding]:
    """Yield what is wrong with one operator, up to the first error: the tests after it fail for the same reason."""
    name = call.operator._schema.name
    file, line = call.place or (None, None)
    for test in _TESTS:
        if test == "test_autograd_registration" and not call.requires_grad:
            continue
        tested = torch.library.opcheck(call.operator, call.args, call.kwargs, test_utils=test, raise_exception=False)
        error = tested[test]
        if isinstance(error, Exception):
            if is_out_of_memory(error):
                raise error
            severity, said, hint = _meaning(test, error)
            yield Finding(
                code="GC424",
                severity=severity,
                message=f"operator {name}: {said}.",
                hint=hint,
                allow=f"GC424:{name}" if severity != "note" else None,
                location=Location(file=file, line=line, op=name),
            )
            if severity != "warning":
                return


def _meaning(test: str, error: Exception) -> tuple[Severity, str, str]:
    """Return the severity of a failed test, the end of a sentence, and what to do.

    A schema, an autograd key or a shape that is false is an error, because programs are transformed by what these say;
    an operator without a fake kernel runs in eager mode all the same.
    """
    raised = first_line(error).rstrip(".")
    said = raised.removeprefix(f"{type(error).__name__}: ")
    if test == "test_schema" and any(word in said for word in ("mutated", "alias")):
        hint = "declare what it changes (mutates_args, or '(a!)' in a schema), and return a copy of an input."
        return "error", f"its schema is false ({said})", hint
    if test == "test_autograd_registration" and isinstance(error, AssertionError):
        said = "it registers no autograd kernel; its gradient comes from inside the kernel of a device, which "
        hint = "register its gradient with torch.library.register_autograd, or at the key Autograd."
        return "error", f"{said}torch.compile and torch.export do not see", hint
    correct, register = (f"{what} torch.library.register_fake." for what in ("correct the function given to", "use"))
    if isinstance(error, MetadataMismatchError):
        return (
            "error",
            f"its fake kernel returns other tensors than it does ({said.rpartition('metadata: ')[2]})",
            correct,
        )
    if test != "test_faketensor":
        return "note", f"opcheck cannot test it: {test} raises {raised}", ""
    if isinstance(error, UnsupportedOperatorException) or "no fake impl" in said:
        return "warning", "it has no fake kernel: torch.compile and torch.export refuse it", register
    return "warning", f"its fake kernel raises {raised}", correct
