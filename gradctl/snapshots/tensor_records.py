"""What a snapshot keeps of a tensor, and the norm of the difference between a kept tensor and another.

A tensor is kept as its projections on Gaussian directions: of a difference d the root mean square of its projections is
|d| times sqrt(X / k), where X has the chi-square distribution with k degrees of freedom. With k = 8 a difference of 0.3
tolerances is called larger than one with probability 1e-15, and one of 10 tolerances is missed with probability 1e-7.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gradctl.comparison.difference import dtype_name
from gradctl.numerics.measures import dense, norm
from gradctl.snapshots.snapshot_file import TensorRecord

K = TypeVar("K")

DIRECTIONS = 8
# Of a tensor of so few numbers all are kept.
FEW = 8
_LARGEST = 3
# Rows of directions that are in memory at a time.
_CHUNK = 2**16
# Digits of a projection in a narrow dtype: 1e-9 of the norm is far below its tolerance.
_NATIVE_DIGITS = 9


def digest(tensor: Tensor) -> str:
    """Return 128 bits of a hash of the elements in row-major order, bit by bit."""
    flat = plain(tensor).contiguous().reshape(-1)
    if flat.numel() == 0:
        return hashlib.sha256(b"").hexdigest()[:32]
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()[:32]


def record_tensors(tensors: Mapping[K, Tensor], noise: Mapping[K, float]) -> dict[K, TensorRecord]:
    """Return the record of each tensor; integers have projections only if the noise changes them."""
    projected = project({key: tensor for key, tensor in tensors.items() if _needs_projections(tensor, noise[key])})
    return {key: _record(tensor, noise[key], projected.get(key)) for key, tensor in tensors.items()}


def distance(stored: TensorRecord, now: TensorRecord) -> float:
    """Return the norm of the difference of two recorded tensors, estimated for large ones; infinite if they are of
    another shape, have NaN or infinity in other places, or are integers that differ and are stable.
    """
    if stored.shape != now.shape or stored.nonfinite != now.nonfinite:
        return math.inf
    if stored.digest == now.digest:
        return 0.0
    if stored.elements and now.elements:
        return math.dist(stored.elements, now.elements)
    if stored.projections and now.projections:
        return math.dist(stored.projections, now.projections) / math.sqrt(DIRECTIONS)
    return math.inf


def project(tensors: Mapping[K, Tensor]) -> dict[K, Sequence[float]]:
    """Return the projections of each tensor on the same directions, which numpy's frozen generator draws in chunks.

    Elements that are not finite count as zero, complex ones as two numbers.
    """
    flats = {key: _real(tensor).reshape(-1) for key, tensor in tensors.items()}
    sums = {key: np.zeros(DIRECTIONS) for key in flats}
    longest = max((flat.numel() for flat in flats.values()), default=0)
    for number, start in enumerate(range(0, longest, _CHUNK)):
        rows = np.random.RandomState(number).standard_normal((min(_CHUNK, longest - start), DIRECTIONS))
        for key, flat in flats.items():
            if start < flat.numel():
                part = _finite(flat[start : start + _CHUNK]).numpy()
                sums[key] += part @ rows[: len(part)]
    return {key: found.tolist() for key, found in sums.items()}


def is_exact(dtype: str) -> bool:
    """Return whether tensors of a dtype are compared bit by bit: integers and booleans."""
    found: torch.dtype = getattr(torch, dtype)
    return not (found.is_floating_point or found.is_complex)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, strided and with its values resolved."""
    strided = dense(tensor.detach())
    assert strided is not None
    if strided.is_quantized:
        strided = strided.dequantize()
    return strided.resolve_conj().resolve_neg().cpu()


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers with the elements of a tensor."""
    found = plain(tensor)
    return torch.view_as_real(found.to(torch.complex128)) if found.is_complex() else found


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.to(torch.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _needs_projections(tensor: Tensor, noise: float) -> bool:
    return _real(tensor).numel() > FEW and (noise > 0 or not is_exact(dtype_name(tensor.dtype)))


def _record(tensor: Tensor, noise: float, projections: Sequence[float] | None) -> TensorRecord:
    tensor = plain(tensor)
    dtype = dtype_name(tensor.dtype)
    is_wide, is_stable = dtype in ("float64", "complex128"), is_exact(dtype) and not noise
    real = _real(tensor).reshape(-1)
    values = _finite(real)
    is_small = values.numel() <= FEW
    digits = 17 if is_wide or is_exact(dtype) else _NATIVE_DIGITS
    return TensorRecord(
        shape=tuple(tensor.shape),
        dtype=dtype,
        digest=digest(tensor),
        norm=norm(values),
        noise=noise,
        nonfinite=_nonfinite(real),
        elements=tuple(values.tolist()) if is_small and not is_stable else (),
        projections=tuple(float(f"{each:.{digits}g}") for each in projections or ()),
        largest=_largest(values, _LARGEST) if is_wide and not is_small else (),
    )


def _largest(values: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    places = values.abs().topk(count).indices.tolist()
    return tuple((place, float(values[place])) for place in places)


def _nonfinite(real: Tensor) -> str | None:
    """Return a digest of the places of NaN, inf and -inf; None if all elements are finite."""
    if bool(torch.isfinite(real).all()):
        return None
    kinds = torch.stack([torch.isnan(real), real == math.inf, real == -math.inf])
    return digest(kinds)
