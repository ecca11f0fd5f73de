"""Kernels as people write them by hand: a plain reference, a right twin, and the mistakes of published kernels."""
