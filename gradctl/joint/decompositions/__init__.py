"""Operators of backwards that ONNX, or torch's exporter, lacks, each written with operators that are there.

A file a family; each has ``TABLE``, from an operator to the function that stands for it, in the way of
``torch._decomp``. Each is tested against autograd over all its options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradctl.joint.decompositions import (
    activation,
    assignment,
    complex_numbers,
    convolution,
    ctc,
    distances,
    embedding,
    fourier,
    gamma,
    grid_sampling,
    indexing,
    layout,
    linear,
    linear_algebra,
    losses,
    normalization,
    ordering,
    padding,
    pooling,
    quantization,
    resampling,
    scans,
    special,
)

__all__ = ["EARLY", "TABLE"]

# Those that the trace in which autograd runs takes already.
EARLY: dict[Any, Callable[..., Any]] = linear_algebra.EARLY

_OF_REALS: dict[Any, Callable[..., Any]] = {
    **activation.TABLE,
    **assignment.TABLE,
    **convolution.TABLE,
    **ctc.TABLE,
    **distances.TABLE,
    **embedding.TABLE,
    **fourier.TABLE,
    **gamma.TABLE,
    **grid_sampling.TABLE,
    **indexing.TABLE,
    **layout.TABLE,
    **linear.TABLE,
    **linear_algebra.TABLE,
    **losses.TABLE,
    **normalization.TABLE,
    **ordering.TABLE,
    **padding.TABLE,
    **pooling.TABLE,
    **quantization.TABLE,
    **resampling.TABLE,
    **scans.TABLE,
    **special.TABLE,
}
TABLE: dict[Any, Callable[..., Any]] = complex_numbers.added_to(_OF_REALS)
