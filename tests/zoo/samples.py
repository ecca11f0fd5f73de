"""Of sample_models: which are right, in eager at least."""

from __future__ import annotations

__all__ = ["RIGHT_SAMPLES"]

RIGHT_SAMPLES = (
    "control_flow",
    "custom_relu",
    "energy_and_forces",
    "forces",
    "gru",
    "linear",
    "mlp",
    "no_grad_inside",
    "resnet",
    "straight_through_detach",
    "tied_weights",
    "transformer",
)
