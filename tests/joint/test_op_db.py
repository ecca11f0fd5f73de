"""No operator of torch's own table gets a joint graph that is silently wrong, and those that are right stay right.

The default run takes a sample, and the operators that once were wrong; ``tests/benchmarks/joint_coverage.py`` prints
the whole table.
"""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.joint_coverage import OPERATORS, cases

# Wrong, without a word, in torch.onnx 2.13: in its forward (log_ndtr, index_add, the mean of scatter_reduce, a norm
# that keeps its axes, the statistics of a batch norm in eval mode), or in a gradient.
ONCE_WRONG = (
    "as_strided",
    "index_add",
    "linalg.norm",
    "native_batch_norm",
    "nn.functional.soft_margin_loss",
    "scatter_reduce.mean",
    "special.log_ndtr",
)

# Right on all of eight samples.
RIGHT = (
    "_batch_norm_with_update",
    "_upsample_bilinear2d_aa",
    "add",
    "addmm",
    "amax",
    "angle",
    "as_strided_scatter",
    "atan2",
    "baddbmm",
    "block_diag",
    "cat",
    "cdist",
    "clamp",
    "copysign",
    "cross",
    "cummax",
    "cumprod",
    "cumsum",
    "diagonal",
    "digamma",
    "einsum",
    "erfinv",
    "expand",
    "fft.hfft2",
    "fft.ifftn",
    "fft.irfft",
    "fft.rfft2",
    "gather",
    "gradient",
    "grid_sampler_2d",
    "hypot",
    "index_put",
    "index_reduce.amax",
    "index_select",
    "kthvalue",
    "lerp",
    "lgamma",
    "linalg.multi_dot",
    "logcumsumexp",
    "logsumexp",
    "masked.softmax",
    "masked_scatter",
    "matmul",
    "max.reduction_with_dim",
    "median",
    "nanmedian",
    "nanquantile",
    "native_layer_norm",
    "nn.functional.adaptive_max_pool2d",
    "nn.functional.avg_pool3d",
    "nn.functional.batch_norm",
    "nn.functional.bilinear",
    "nn.functional.conv2d",
    "nn.functional.conv_transpose2d",
    "nn.functional.cross_entropy",
    "nn.functional.embedding_bag",
    "nn.functional.gelu",
    "nn.functional.grid_sample",
    "nn.functional.group_norm",
    "nn.functional.instance_norm",
    "nn.functional.interpolate.bicubic",
    "nn.functional.interpolate.nearest",
    "nn.functional.kl_div",
    "nn.functional.layer_norm",
    "nn.functional.max_pool2d",
    "nn.functional.max_unpool2d",
    "nn.functional.multi_margin_loss",
    "nn.functional.nll_loss",
    "nn.functional.pad.replicate",
    "nn.functional.pdist",
    "nn.functional.rms_norm",
    "nn.functional.softshrink",
    "nn.functional.unfold",
    "norm",
    "polygamma.polygamma_n_1",
    "pow",
    "prod",
    "quantile",
    "renorm",
    "roll",
    "scatter_add",
    "scatter_reduce.amax",
    "sinc",
    "slice_scatter",
    "softmax",
    "sort",
    "special.erfcx",
    "special.ndtri",
    "special.xlog1py",
    "std_mean",
    "stft",
    "take_along_dim",
    "topk",
    "trapezoid",
    "tril",
    "unfold_copy",
    "var_mean",
    "where",
)
SAMPLED = (*ONCE_WRONG, *random.Random(0).sample(sorted(OPERATORS), 6))


def states(names: list[str], count: int) -> dict[str, list[tuple[str, str, str]]]:
    found = [case for of_one in cases(names, count, jobs=2) for case in of_one]
    return {
        state: [(case.operator, case.sample, case.reason) for case in found if case.state == state]
        for state in {case.state for case in found}
    }


def test_no_operator_of_a_sample_is_wrong():
    found = states(list(SAMPLED), 1)
    assert found["right"]
    assert not found.get("WRONG")


def test_operators_that_are_right_stay_right():
    found = states(random.Random(0).sample(RIGHT, 8), 1)
    assert set(found) == {"right"}, {state: each for state, each in found.items() if state != "right"}


@pytest.mark.slow
def test_no_operator_is_wrong():
    assert not states(sorted(OPERATORS), 3).get("WRONG")


@pytest.mark.slow
def test_options_of_operators_that_are_right_are_right():
    assert set(states(RIGHT, 8)) == {"right"}
