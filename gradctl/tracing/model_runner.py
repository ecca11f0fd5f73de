"""One model as a function of float64 leaves, run in three ways: for autograd, at the point, and beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from gradctl.numerics.runner import Outputs
from gradctl.subject.instance import Instance, Leaf
from gradctl.subject.loading.triton_interpreter import kernels_in_float64
from gradctl.tracing.control_flow import plain_control_flow
from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.graph import modules_by_identity
from gradctl.tracing.promotion import Promotion, default_dtype
from gradctl.tracing.recorder import Recorder
from gradctl.tracing.recording import Recording


class ModelRunner:
    """Run a private copy of the user's model, in float64 if there is a ``promotion``."""

    def __init__(self, instance: Instance, promotion: Promotion | None, watch: FunctionWatch) -> None:
        self.instance = instance
        self.leaves: Sequence[Leaf] = instance.leaves
        self.promotion = promotion
        self.watch = watch  # replaces custom Functions; ``linearised`` is set before ``record``
        watch.modules = modules_by_identity(instance.model)
        self.recording = Recording()  # the cuts and hooks of the last ``record``
        self._is_plain = False  # whether the promotion changed no operator at the point: it costs as much as the model

    @property
    def extra(self) -> float:
        """The sum that linear maps with an offset add to the objective in the last run."""
        return self.watch.extra

    @property
    def writes(self) -> bool:
        """Whether the program writes without autograd's knowledge, so that version counters do not count."""
        return bool(self.recording.written) or any(cut.writes for cut in self.recording.cuts.values())

    def differentiate(self) -> Outputs:
        """Return the outputs with their graph, hooks disabled."""
        return self.run(Recorder(hooks_only=True))

    def record(self) -> Outputs:
        """Return the outputs at the point; note cuts, hooks and Functions."""
        self.watch.maps.clear()
        program = Recorder()
        if self.promotion is not None:
            self.promotion.turned = False
        outputs = self.run(program)
        self.recording = program.recording
        self._is_plain = self.promotion is not None and not self.promotion.turned
        return outputs

    def beside(self) -> Outputs:
        """Return the outputs beside the point, with all that was recorded held fixed.

        Raises:
            BranchChanged: the program made other calls than at the point.
        """
        return self.run(Recorder(self.recording), is_plain=self._is_plain)

    @contextmanager
    def promoted(self) -> Iterator[None]:
        """Run a backward as the forward was run: under the promotion."""
        with ExitStack() as stack:
            if self.promotion is not None:
                stack.enter_context(default_dtype(torch.float64))
                stack.enter_context(self.promotion)
                stack.enter_context(kernels_in_float64())
            yield

    def run(self, program: Recorder, *, is_plain: bool = False) -> Outputs:
        """Return the outputs of one run that ``program`` watches; without operators to promote, if it ``is_plain``."""
        self.watch.begin(program)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(program.functions())
            stack.enter_context(plain_control_flow())
            if is_plain:
                stack.enter_context(default_dtype(torch.float64))
                stack.enter_context(kernels_in_float64())
            else:
                stack.enter_context(self.promoted())
            return self.instance.run(program)
