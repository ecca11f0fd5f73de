"""Operators in C++, registered with ``TORCH_LIBRARY``: a right one, one whose backward is wrong, and one without any.

Built here by ``torch.utils.cpp_extension``. The backward is a Function of C++, which Python does not see.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

from tests.judged import assert_passes, codes, finding, judge, wrong_tensors

pytestmark = [
    pytest.mark.slow,  # the compiler takes half a minute
    pytest.mark.skipif(not shutil.which("g++") or not shutil.which("ninja"), reason="needs g++ and ninja"),
]

SOURCE = """
#include <torch/extension.h>
using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// y = x * |x|, element by element, and its derivative 2 |x|.
Tensor signed_square_cpu(const Tensor& x) {
  Tensor from = x.contiguous(), y = torch::empty_like(from);
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "signed_square", [&] {
    const scalar_t* in = from.const_data_ptr<scalar_t>();
    scalar_t* out = y.data_ptr<scalar_t>();
    for (int64_t i = 0; i < from.numel(); ++i) out[i] = in[i] * std::abs(in[i]);
  });
  return y;
}

struct SignedSquare : public torch::autograd::Function<SignedSquare> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double factor) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    ctx->saved_data["factor"] = factor;
    static auto op = c10::Dispatcher::singleton()
        .findSchemaOrThrow("gradctl_cpp::signed_square", "").typed<Tensor(const Tensor&)>();
    return op.call(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    Tensor x = ctx->get_saved_variables()[0];
    return {gradients[0] * x.abs() * ctx->saved_data["factor"].toDouble(), Tensor()};
  }
};

TORCH_LIBRARY(gradctl_cpp, m) {
  m.def("signed_square(Tensor x) -> Tensor");
  m.def("signed_square_wrong(Tensor x) -> Tensor");
  m.def("signed_square_alone(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(gradctl_cpp, CPU, m) {
  m.impl("signed_square", signed_square_cpu);
  m.impl("signed_square_wrong", signed_square_cpu);
  m.impl("signed_square_alone", signed_square_cpu);
}
TORCH_LIBRARY_IMPL(gradctl_cpp, Autograd, m) {
  m.impl("signed_square", [](const Tensor& x) { return SignedSquare::apply(x, 2.0); });
  m.impl("signed_square_wrong", [](const Tensor& x) { return SignedSquare::apply(x, 2.2); });
}
TORCH_LIBRARY_IMPL(gradctl_cpp, Meta, m) {
  m.impl("signed_square", [](const Tensor& x) { return torch::empty_like(x); });
  m.impl("signed_square_wrong", [](const Tensor& x) { return torch::empty_like(x); });
}
"""


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cpp"))
    cpp_extension.load_inline("gradctl_cpp", SOURCE, build_directory=folder, is_python_module=False)
    return torch.ops.gradctl_cpp


class Net(nn.Module):
    def __init__(self, called):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.called = nn.Linear(4, 3), nn.Linear(3, 2), called

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.called(self.fc1(x)))


def unit_of(called):
    return judge(Net(called), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


def test_a_right_operator_passes_in_float64(operators):
    unit = unit_of(operators.signed_square)
    assert_passes(unit)
    assert (unit.oracle.dtype, unit.oracle.islands, codes(unit)) == ("float64", (), set())


def test_a_wrong_backward_is_named_by_the_operator(operators):
    unit = unit_of(operators.signed_square_wrong)
    assert wrong_tensors(unit) == ["input:x", "param:fc1.bias", "param:fc1.weight"]
    places = {each.location.op for each in unit.findings if each.code == "GC401" and each.location is not None}
    assert len(places) == 1 and "gradctl_cpp.signed_square_wrong" in places.pop()


def test_an_operator_without_an_autograd_kernel_has_no_gradient(operators):
    unit = unit_of(operators.signed_square_alone)
    missing = {each.tensor for each in unit.findings if each.code == "GC403"}
    assert missing == {"input:x", "param:fc1.bias", "param:fc1.weight"}
    assert "it has no fake kernel" in finding(unit, "GC424").message
