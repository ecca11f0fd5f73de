"""A check at several sizes and layouts: bugs that the example's size hides, and their clean twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.gradients.gradcheck import gradcheck
from gradctl.gradients.size_sweep import gradcheck_at_sizes
from gradctl.subject.inputs.sizes import parse_sizes
from gradctl.subject.loading.load import make_subject
from tests.sweeps import sampled


def faulty(is_wrong):
    """Return x @ w whose backward is 10 % off in w if ``is_wrong(x, cotangent)``."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, gradient):
            x, w = ctx.saved_tensors
            of_w = torch.einsum("b...i,b...j->ij", x, gradient)
            return gradient @ w.T, 1.1 * of_w if is_wrong(x, gradient) else of_w

    return Product


def subject_of(is_wrong, *, seed=0):
    torch.manual_seed(seed)
    return make_subject(faulty(is_wrong), (torch.randn(2, 16, 4), torch.randn(4, 3)))


def checked(is_wrong, text, **options):
    return gradcheck_at_sizes(subject_of(is_wrong), parse_sizes(text), **options)


SIZES = "batch=1,2,4,7; seq@x:1=1,16,17"
PLANTED = {
    "from batch 4": (lambda x, g: x.shape[0] >= 4, "batch=1,2,4,7", "Found from batch=4 on, not at batch=1; batch=2; "),
    "only at size 1": (lambda x, g: x.shape[0] == 1, "batch=1,2,4", "Found at batch=1, not at batch=2; "),
    "length that 16 does not divide": (
        lambda x, g: x.shape[1] % 16 != 0,
        "seq@x:1=16,17,32",
        "Found at seq=17; seq=17, strided, not at seq=16; seq=16, transposed; seq=16, expanded cotangent; seq=32; "
        "seq=32, offset storage.",
    ),
    "transposed": (
        lambda x, g: x.stride(-1) > x.stride(-2),
        "batch=2,7",
        "Found at batch=2, transposed, not at batch=2; batch=2, offset storage; batch=7; batch=7, strided; "
        "batch=7, expanded cotangent.",
    ),
    "strided": (lambda x, g: x.stride(-1) == 2, "batch=2,7", "Found at batch=7, strided, not at batch=2; "),
    "offset storage": (
        lambda x, g: x.storage_offset() > 0,
        "batch=2,7",
        "Found at batch=2, offset storage, not at batch=2; ",
    ),
}


@pytest.mark.parametrize("name", sampled(PLANTED, always=["from batch 4", "transposed", "offset storage"]))
def test_a_bug_that_the_example_hides_is_found_at_its_size_or_layout(name):
    is_wrong, text, places = PLANTED[name]
    assert gradcheck(subject_of(is_wrong)).verdict == "pass"
    unit = checked(is_wrong, text)
    assert unit.verdict == "fail"
    (finding,) = [each for each in unit.findings if each.severity == "error" and each.code == "GC408"]
    assert places in finding.message
    assert [row.tensor for row in unit.tensors if row.verdict == "reference-wrong"] == ["input:w"]


def test_a_function_that_is_wrong_for_an_expanded_cotangent_is_wrong_at_each_size():
    """The check of a Function alone passes such a cotangent at every size; the layout makes the model pass it."""
    unit = checked(lambda x, g: g.stride(0) == 0, "batch=2,7")
    of_function, of_tensor = [finding for finding in unit.findings if finding.severity == "error"]
    assert "expanded (stride 0)" in of_function.message
    assert of_function.message.endswith("Found at all 6 sizes and layouts.")
    assert of_tensor.tensor == "input:w"
    assert of_tensor.message.endswith("Found at batch=7, expanded cotangent.")


@pytest.mark.parametrize("seed", range(3))
def test_the_clean_twin_is_silent_at_all_sizes_and_layouts(seed):
    unit = gradcheck_at_sizes(subject_of(lambda x, g: False, seed=seed), parse_sizes(SIZES))
    assert unit.verdict == "pass"
    assert [finding for finding in unit.findings if finding.severity != "note"] == []
    assert unit.reason is None
    assert len(unit.variations) == 12 + 4


def test_the_unit_is_of_the_smallest_size_that_fails():
    unit = checked(lambda x, g: x.shape[0] >= 4, SIZES)
    (x,) = [row for row in unit.tensors if row.tensor == "input:x"]
    assert x.shape == (4, 1, 4)


def test_findings_of_larger_sizes_are_kept():
    """Of x it is wrong at 4 and of w at 7: both are reported, with their own sizes."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return 2 * x + w

        @staticmethod
        def backward(ctx, gradient):
            size = gradient.shape[0]
            return (3.0 if size == 4 else 2.0) * gradient, (0.5 if size == 7 else 1.0) * gradient

    subject = make_subject(Sum, (torch.randn(2, 3), torch.randn(2, 3)))
    unit = gradcheck_at_sizes(subject, parse_sizes("batch=3,4,7"))
    wrong = {row.tensor: row.shape for row in unit.tensors if row.verdict == "reference-wrong"}
    assert wrong == {"input:x": (4, 3), "input:w": (7, 3)}
    messages = [finding.message for finding in unit.findings if finding.tensor == "input:w"]
    assert any("Found at batch=7" in message for message in messages), messages


def test_a_size_that_the_model_refuses_is_not_tried():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[0] % 2:
                raise ValueError("the batch is odd")
            return super().forward(x)

    torch.manual_seed(0)
    unit = gradcheck_at_sizes(make_subject(Picky(4, 3), torch.randn(2, 4)), parse_sizes("batch=1,2,4"))
    assert unit.verdict == "pass"
    assert "batch=1" not in unit.variations
    assert unit.reason == "not tried: batch=1 (Picky raises on x=f32[1,4]: ValueError: the batch is odd)"


def test_if_the_model_refuses_every_size_its_error_is_raised():
    def fixed(x):
        return x.reshape(2, 8).sin()

    with pytest.raises(TargetError) as caught:
        gradcheck_at_sizes(make_subject(fixed, torch.randn(4, 4)), parse_sizes("batch=1,7"))
    assert str(caught.value).startswith(
        "GC111 none of 6 sizes can be checked. At batch=1: fixed raises on x=f32[1,4]: "
    )


def test_if_nothing_is_differentiable_at_any_size_that_is_the_error():
    with pytest.raises(NothingToCheck, match=r"GC110 none of 5 sizes can be checked\. At batch=3: no output of "):
        gradcheck_at_sizes(make_subject(torch.detach, torch.randn(4, 4)), parse_sizes("batch=3"))


def test_an_accepted_finding_passes_at_all_sizes():
    unit = checked(lambda x, g: x.shape[0] >= 4, "batch=1,4", allows=("GC408:Product",))
    assert unit.verdict == "pass"
    assert [finding.allowed for finding in unit.findings if finding.severity == "error"] == [True]


def test_a_layer_norm_is_right_under_an_expanded_cotangent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    unit = gradcheck_at_sizes(make_subject(model, torch.randn(3, 4)), parse_sizes("batch=2,5"))
    assert unit.verdict == "pass"
    assert "batch=5, expanded cotangent" in unit.variations


def test_progress_counts_the_sizes():
    said = []
    checked(lambda x, g: False, "batch=1,2", progress=said.append)
    assert said[0].startswith("1 of 6 sizes, batch=1: step 1 of 4")
    assert any(text.startswith("6 of 6 sizes, batch=2, expanded cotangent: ") for text in said)
