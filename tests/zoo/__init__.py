"""Models for the tests: right ones of many kinds, and wrong ones made from them by planting one mistake."""

from tests.zoo.planted import GRADIENT_BUGS, LINEAR_BUGS, NATIVE_BUGS, Planted, plant
from tests.zoo.random_nets import random_net
from tests.zoo.samples import RIGHT_SAMPLES
from tests.zoo.transformers import TRANSFORMERS

__all__ = [
    "GRADIENT_BUGS",
    "LINEAR_BUGS",
    "NATIVE_BUGS",
    "RIGHT_SAMPLES",
    "TRANSFORMERS",
    "Planted",
    "plant",
    "random_net",
]
