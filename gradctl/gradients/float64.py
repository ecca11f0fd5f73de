"""The float64 runner of a subject: promoted through casts where the program takes that, as far as it goes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding, note
from gradctl.numerics.measures import norm, relative_error
from gradctl.subject.frames import first_line
from gradctl.subject.instance import InputMode, Instance, native_dtype
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.promotion import Promotion

# Casts are more than rounding where the float64 model's output is off by more than this many native epsilons:
# rounding of deep float32 nets was seen at up to 1e3, a bfloat16 cast in a float32 net is 6e4.
_ROUNDING_EPSILONS = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class OracleRunner:
    """A runner, the dtype it computes in, and why it is not float64 throughout if it is not."""

    runner: ModelRunner
    dtype: torch.dtype
    reason: str | None

    @property
    def is_promoted(self) -> bool:
        """Whether parameters and inputs are float64, whatever the casts inside are."""
        return self.dtype == torch.float64

    @property
    def islands(self) -> tuple[str, ...]:
        """What ran in a dtype of its own."""
        inner = tuple(self.runner.promotion.islands) if self.runner.promotion is not None else ()
        return (self.reason, *inner) if self.reason else inner


def oracle_runner(subject: Subject, input_mode: InputMode, watch: FunctionWatch) -> OracleRunner:
    """Return the subject in float64: under the promotion mode; if that fails, promoted but for its casts; if that
    fails too (a kernel that knows float32 alone), as it is, where finite differences resolve little.
    """
    native = native_dtype(subject)
    reason = None
    for promoted, mode in ((True, Promotion(native)), (True, None), (False, None)):
        runner = ModelRunner(Instance(subject, promoted=promoted, input_mode=input_mode), mode, watch)
        try:
            _try_backward(runner)
        except Exception as error:  # the program may refuse float64 in any way; then it runs as it is
            if is_out_of_memory(error) or not promoted:
                raise
            what = "float64" if mode is None else "its casts turned to float64"
            reason = f"the model refuses {what}: {first_line(error)}"
            continue
        return OracleRunner(runner, torch.float64 if promoted else native, reason)
    raise AssertionError("the native run succeeded before")


def _try_backward(runner: ModelRunner) -> None:
    """Run forward and backward once; raise what they raise."""
    with runner.instance.preserve_leaves():
        outputs = [t for _, t in runner.differentiate() if t.requires_grad]
        with runner.promoted():
            torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])
    for leaf in runner.leaves:
        leaf.take_gradient()


def cast_note(
    native: dict[str, Tensor], promoted: list[tuple[str, Tensor]], rounding: Callable[[], dict[str, float]]
) -> Finding | None:
    """Return a note if the float64 outputs differ from the native ones by more than rounding.

    ``rounding`` measures that of the native outputs, in Euclidean norm: of one that is zero but for rounding, a
    relative difference says nothing. It costs three runs, and is called only if there is a difference.
    """
    ulps = {name: off for name, off in _errors_in_ulps(native, promoted).items() if off > _ROUNDING_EPSILONS}
    noise, values = rounding() if ulps else {}, dict(promoted)
    ulps = {name: off for name, off in ulps.items() if not norm(values[name] - native[name]) <= 10 * noise[name]}
    if not ulps:
        return None
    name = max(ulps, key=lambda each: (ulps[each], each))
    own = native[name]
    error = ulps[name] * torch.finfo(own.dtype).eps
    return note(
        "GC411",
        f"in float64 {name} differs by {error:.2e} (relative) from the native "
        f"{str(own.dtype).removeprefix('torch.')} run: casts to narrower dtypes inside the model are treated as exact, "
        "as in autograd.",
        quantity="output",
        tensor=name,
    )


def _errors_in_ulps(native: dict[str, Tensor], promoted: list[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the relative error of each native output, in its machine epsilons."""
    return {
        name: relative_error(value, native[name]) / torch.finfo(native[name].dtype).eps
        for name, value in promoted
        if name in native and native[name].shape == value.shape
    }
