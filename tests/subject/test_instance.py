"""A private copy: the user's object stays as it was, names and ties are right, and each run is like the first."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError
from gradctl.subject.instance import Instance, native_dtype
from gradctl.subject.subject import Subject

X = torch.tensor([[1.0, -2.0, 3.0]])


def instance_of(model, *args, promoted: bool = False, **kwargs) -> Instance:
    return Instance(Subject(target="test", model=model, args=args, kwargs=kwargs), promoted=promoted)


def leaf_names(instance: Instance) -> list[str]:
    return [leaf.name for leaf in instance.leaves]


class Tied(nn.Module):
    def __init__(self, *, share_object: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        if share_object:
            self.head.weight = self.embed.weight
        else:
            self.head.weight = nn.Parameter(self.embed.weight.data)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("share_object", [True, False], ids=["one parameter", "two parameters on one storage"])
@pytest.mark.parametrize("promoted", [False, True])
def test_tied_weights_are_one_leaf_with_two_names_and_one_gradient(share_object, promoted):
    model = Tied(share_object=share_object)
    instance = instance_of(model, torch.tensor([1, 2]), promoted=promoted)
    (leaf,) = instance.leaves
    assert {leaf.name, *leaf.tied} == {"param:embed.weight", "param:head.weight"}
    instance.run()[0][1].sum().backward()
    gradient = leaf.take_gradient()
    weight = model.embed.weight.detach().clone().requires_grad_()
    (nn.functional.embedding(torch.tensor([1, 2]), weight) @ weight.T).sum().backward()
    torch.testing.assert_close(gradient, weight.grad.to(gradient.dtype))
    assert leaf.take_gradient() is None
    with torch.no_grad():
        leaf.tensor.zero_()
    assert instance.run()[0][1].abs().sum() == 0


def test_frozen_parameters_are_no_leaves_and_unused_ones_are():
    model = nn.ModuleDict({"frozen": nn.Linear(3, 2).requires_grad_(False), "unused": nn.Linear(1, 1)})
    model.forward = model["frozen"].forward
    assert leaf_names(instance_of(model, X)) == ["param:unused.weight", "param:unused.bias", "input:input"]


@dataclass
class Batch:
    x: Tensor
    mask: Tensor
    extras: dict[str, list[Tensor]]
    name: str = "batch"


def test_nested_inputs_have_names_by_path():
    def model(batch: Batch, scale: float = 1.0, *, shift: Tensor) -> Tensor:
        return batch.x * scale + shift + batch.extras["xs"][0]

    instance = instance_of(model, Batch(X, X > 0, {"xs": [X.clone()]}), 2.0, shift=torch.zeros(3))
    assert leaf_names(instance) == ["input:batch.x", "input:batch.extras.xs.0", "input:shift"]
    assert instance.run()[0][1].tolist() == (3 * X).tolist()


def test_the_same_tensor_given_twice_is_one_leaf():
    (leaf,) = instance_of(lambda a, b: a * b, X, X).leaves
    assert (leaf.name, leaf.tied) == ("input:a", ("input:b",))


ALL = torch.arange(24.0)
LAYOUTS = {
    "transposed": ALL.view(4, 6).t(),
    "channels last": ALL.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "gaps": ALL.view(4, 6)[:, ::2],
    "integers with gaps": ALL.long().view(4, 6)[:, ::2],
}


@pytest.mark.parametrize("promoted", [False, True])
@pytest.mark.parametrize("input_mode", ["leaf", "clone", "constant"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_input_keeps_its_strides(name, input_mode, promoted):
    given = LAYOUTS[name]
    subject = Subject(target="test", model=lambda x: x * 2, args=(given,))
    ((x,), _) = Instance(subject, promoted=promoted, input_mode=input_mode).inputs()
    assert x.stride() == given.stride()
    assert torch.equal(x.to(given.dtype), given) and x.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("given", [torch.ones(1).expand(3), ALL.unfold(0, 4, 1)], ids=["expanded", "windows"])
def test_an_input_whose_elements_share_memory_is_one_leaf_of_that_memory(given):
    instance = Instance(Subject(target="test", model=lambda x: x * 2, args=(given,)))
    (leaf,) = instance.leaves
    assert instance.inputs()[0][0].stride() == given.stride()
    instance.run()[0][1].sum().backward()
    gradient = leaf.take_gradient()
    with torch.no_grad():
        leaf.tensor[0] += 1
    assert (instance.run()[0][1] - 2 * given).sum() == gradient[0]


def test_nested_outputs_have_names_by_path():
    def model(x: Tensor) -> object:
        return {"logits": x, "hidden": (x + 1, None, 3)}, [x > 0]

    assert [name for name, _ in instance_of(model, X).run()] == ["output.0.logits", "output.0.hidden.0", "output.1.0"]


def test_a_bare_output_is_called_output():
    assert [name for name, _ in instance_of(torch.sin, X).run()] == ["output"]


@pytest.mark.parametrize("value", ["text", None, 3.0])
def test_an_output_without_a_tensor_is_an_error(value):
    with pytest.raises(TargetError) as caught:
        instance_of(lambda x: value, X).run()
    kind = type(value).__name__
    assert str(caught.value) == (
        f"GC114 test returns {kind!r} without a tensor in it; "
        "return a tensor, or a tuple, dict or dataclass of tensors."
    )


def test_a_model_that_cannot_be_copied_is_named():
    model = nn.Linear(3, 1)
    model.lock = __import__("threading").Lock()
    with pytest.raises(TargetError) as caught:
        instance_of(model, X)
    assert str(caught.value).startswith(
        "GC112 test cannot be copied, and a check never runs your own object: TypeError"
    )


def test_the_users_model_is_not_changed_and_runs_are_alike():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x = torch.randn(5, 3)
    before, x_before = copy.deepcopy(model.state_dict()), x.clone()
    instance = instance_of(model, x)
    first, second = instance.run()[0][1], instance.run()[0][1]
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, x_before) and all(p.grad is None for p in model.parameters())


def test_a_compiled_model_is_taken_out_of_its_wrapper():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    inner[0] = torch.compile(inner[0])
    instance = instance_of(torch.compile(inner), X)
    assert leaf_names(instance) == ["param:0.weight", "param:0.bias", "param:1.weight", "param:1.bias", "input:input"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_promotion_reaches_parameters_buffers_inputs_and_plain_attributes(dtype):
    model = nn.BatchNorm1d(3).to(dtype).eval()
    model.constants = (torch.ones(3, dtype=dtype), [torch.zeros(1, dtype=torch.int64)])
    subject = Subject(target="test", model=model, args=(X.to(dtype),))
    instance = Instance(subject, promoted=True)
    assert native_dtype(subject) == dtype
    assert {leaf.tensor.dtype for leaf in instance.leaves} == {torch.float64}
    assert {leaf.native_dtype for leaf in instance.leaves} == {dtype}
    assert instance.run()[0][1].dtype == torch.float64
    assert model.weight.dtype == dtype and model.constants[0].dtype == dtype


def test_old_weight_norm_keeps_a_tensor_with_a_history_and_can_be_copied():
    model = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    model(X)
    assert "param:weight_v" in leaf_names(instance_of(model, X))


def test_a_method_of_a_module_has_its_parameters():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def encode(self, x: Tensor) -> Tensor:
            return self.layer(x)

    assert leaf_names(instance_of(Encoder().encode, X)) == ["param:layer.weight", "param:layer.bias", "input:x"]


class Hooked(nn.Module):
    """Scales the gradient of its weight with a hook of its own, and counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(3, 2), 0
        self.fc.weight.register_hook(self.scale)
        self.fc.bias.register_hook(lambda gradient: gradient * 3)

    def scale(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        return gradient * 10

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


@pytest.mark.parametrize("promoted", [False, True])
def test_gradient_hooks_of_parameters_are_kept_where_hooks_are(promoted):
    model = Hooked()
    subject = Subject(target="test", model=model, args=(X,))
    gradients = {}
    for keep in (True, False):
        instance = Instance(subject, promoted=promoted, keep_hooks=keep)
        instance.run()[0][1].sum().backward()
        gradients[keep] = {leaf.name: leaf.take_gradient() for leaf in instance.leaves}
    assert model.calls == 0
    assert instance.disabled_hooks == ("param:fc.weight", "param:fc.bias")
    model(X).sum().backward()
    for name, factor in (("weight", 10), ("bias", 3)):
        own = model.fc.get_parameter(name).grad.to(gradients[True][f"param:fc.{name}"].dtype)
        torch.testing.assert_close(gradients[True][f"param:fc.{name}"], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[False][f"param:fc.{name}"] * factor, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["leaf", "clone", "constant"])
def test_a_tensor_that_is_given_twice_is_one_tensor_in_every_call(mode):
    given = torch.ones(3)
    instance = Instance(Subject("add_", lambda x, y: x.add_(1) + y, (given, given)), input_mode=mode)
    (x, y), _ = instance.inputs()
    assert x is y
    assert x is not given


@pytest.mark.parametrize("promoted", [False, True])
@pytest.mark.parametrize("input_mode", ["leaf", "clone", "constant"])
def test_an_input_keeps_the_alignment_of_its_place_in_the_storage(input_mode, promoted):
    x = torch.arange(200.0)[67:79].view(3, 4)
    instance = Instance(Subject("sine", torch.sin, (x,)), input_mode=input_mode, promoted=promoted)
    ((given,), _) = instance.inputs()
    assert given.storage_offset() == 67 % 64
    assert torch.equal(given.detach().float(), x)
    if input_mode != "constant":
        ((_, y),) = instance.run()
        y.sum().backward()
        assert torch.allclose(instance.leaves[0].take_gradient().float(), x.cos(), atol=1e-4)
