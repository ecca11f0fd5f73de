from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradctl.core.errors import GradctlError, TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.inputs.example import input_names
from gradctl.subject.loading.load import load_subject

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4, drop=0.0):
            super().__init__()
            self.fc = nn.Linear(width, 3)
            self.drop = nn.Dropout(drop)

        def forward(self, x, mask=None):
            return self.drop(self.fc(x))

    def Net_inputs():
        return (torch.ones(2, 4),)

    def square_loss(outputs):
        return outputs.square().sum()

    half = 0.5

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient
"""


def message(target, **options):
    with pytest.raises(GradctlError) as caught:
        load_subject(TargetOptions(target, **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


# What comes out


def test_a_class_with_its_inputs_is_a_subject(write):
    write("net.py", NET)
    subject = load_subject(
        TargetOptions("net.py:Net", arguments=["drop=0.5"], loss="square_loss", seed=3, training=True)
    )
    assert subject.target == "net.py:Net"
    assert subject.module.drop.p == 0.5
    assert [name for name, _ in input_names(subject.model, subject.args, subject.kwargs)] == ["x"]
    assert subject.loss(torch.tensor([2.0])) == 4
    assert (subject.seed, subject.function, subject.notes) == (3, None, ())


def test_a_function_class_is_kept_beside_its_apply(write):
    write("net.py", NET)
    subject = load_subject(TargetOptions("net.py:Scale", input_specs=["x=f32[3]"]))
    assert subject.function.__name__ == "Scale"
    assert subject.model(*subject.args).equal(2 * subject.args[0])


def test_a_model_that_takes_nothing_needs_no_inputs(write):
    write(
        "net.py",
        """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3))
            def forward(self):
                return self.weight.sum()
        """,
    )
    subject = load_subject(TargetOptions("net.py"))
    assert (subject.args, subject.kwargs) == ((), {})


def test_a_model_of_another_library_is_loaded_by_its_module():
    subject = load_subject(
        TargetOptions(
            "torch.nn:Bilinear",
            arguments=["in1_features=2", "in2_features=3", "out_features=1"],
            input_specs=["f32[4,2]", "f32[4,3]"],
        )
    )
    assert subject.model(*subject.args).shape == (4, 1)


# Files without a default: pairs of functions to compare.
OF_FUNCTIONS = {"attention": ":fused", "triton_kernel": ":fused"}


@pytest.mark.parametrize("file", sorted(Path("sample_models").resolve().glob("*.py")), ids=lambda file: file.stem)
def test_every_sample_model_is_loaded_and_runs(file):
    if file.stem == "triton_kernel" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'gradctl[triton]')")
    if file.stem == "triton_kernel" and "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("another test of this process imported triton without its interpreter (inductor does)")
    subject = load_subject(TargetOptions(str(file) + OF_FUNCTIONS.get(file.stem, "")))
    subject.model(*subject.args, **subject.kwargs)


def test_a_compiled_model_is_left_as_it_is(write):
    write(
        "net.py",
        "import torch\nmodel = torch.compile(torch.nn.Linear(3, 1))\ndef model_inputs(): return torch.ones(2, 3)",
    )
    subject = load_subject(TargetOptions("net.py"))
    assert type(subject.model).__name__ == "OptimizedModule"
    assert [name for name, _ in input_names(subject.model, subject.args, subject.kwargs)] == ["input"]


# Where inputs come from


def test_the_first_source_of_inputs_wins(write, tmp_path):
    write("net.py", NET)
    np.savez(tmp_path / "inputs.npz", x=np.zeros((5, 4), dtype=np.float32))
    write("both.py", NET + "\n    def example_inputs():\n        return (torch.ones(7, 4),)\n")

    def rows(target, **options):
        return len(load_subject(TargetOptions(target, **options)).args[0])

    assert rows("net.py:Net", input_specs=["x=f32[6,4]"], inputs_file=tmp_path / "inputs.npz") == 6
    assert rows("net.py:Net", inputs_file=tmp_path / "inputs.npz") == 5
    assert rows("both.py:Net") == 2
    assert rows("both.py:square_loss") == 7


def test_inputs_of_a_dotted_name_have_it_with_underscores(write):
    write(
        "net.py",
        """
        import torch
        from torch import nn
        class Nets:
            small = nn.Linear(3, 1)
        def Nets_small_inputs():
            return torch.ones(2, 3)
        """,
    )
    assert load_subject(TargetOptions("net.py:Nets.small")).args[0].shape == (2, 3)


def test_without_inputs_the_line_to_type_is_proposed_and_works(write):
    write("m.py", "from torch import nn\ndef make_model(width):\n    return nn.Linear(width, 1)\n")
    assert message("m.py", arguments=["width=784"], command="compare") == (
        "GC107 m.py has no inputs. Define example_inputs() next to it, or adapt this to your data: "
        "gradctl compare m.py --arg=width=784 --input 'input=f32[8,784]'."
    )
    assert load_subject(TargetOptions("m.py", arguments=["width=784"], input_specs=["input=f32[8,784]"])).args[
        0
    ].shape == (8, 784)


def test_inputs_make_a_function_of_plain_types_a_function_of_tensors(write):
    write("f.py", "def repeat(x, n: int):\n    return x.repeat(n)\ndef power(n: int):\n    return 2.0 ** n\n")
    subject = load_subject(TargetOptions("f.py:repeat", input_specs=["x=f32[3]", "n=2"]))
    assert subject.model(*subject.args).shape == (6,)
    assert load_subject(TargetOptions("f.py:power", input_specs=["n=3"])).args == (3,)


def test_example_inputs_that_do_not_fit_the_target_say_so(write):
    write("f.py", "import torch\ndef f(a, b): ...\ndef example_inputs():\n    return (torch.ones(1),)\n")
    assert message("f.py:f") == ("GC104 input 'b' is missing: f takes a, b. Add, for example, --input 'b=f32[8,8]'.")


# Seeds

DRAWING = """
    import random
    import numpy as np
    import torch
    from torch import nn

    at_import = torch.rand(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)), float(at_import))

        def forward(self, x):
            return x

    def Net_inputs():
        return torch.rand(3)
"""


def test_one_seed_gives_one_model_and_one_set_of_inputs(write):
    write("net.py", DRAWING)
    first, again, other = (load_subject(TargetOptions("net.py", seed=seed)) for seed in (1, 1, 2))
    assert first.model.drawn == again.model.drawn
    assert first.args[0].equal(again.args[0])
    assert all(one != two for one, two in zip(first.model.drawn, other.model.drawn, strict=True))
    assert not first.args[0].equal(other.args[0])


def test_model_and_inputs_each_begin_at_the_seed_whatever_the_import_drew(write):
    write("net.py", DRAWING)
    subject = load_subject(TargetOptions("net.py", seed=1))
    first = float(torch.rand(1, generator=torch.Generator().manual_seed(1)))
    assert subject.model.drawn[2:] == (first, first)
    assert float(subject.args[0][0]) == first


def test_loading_leaves_the_generators_as_they_were(write):
    write("net.py", DRAWING)

    def drawn():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        yield
        yield random.random(), float(np.random.rand()), float(torch.rand(1))

    expected = list(drawn())[1]
    values = drawn()
    next(values)
    load_subject(TargetOptions("net.py"))
    assert next(values) == expected


# Mode

MODES = """
    import torch
    from torch import nn
    def make_model(kind, training=True):
        model = {{
            "norms": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)),
            "quiet": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.InstanceNorm1d(3), nn.LayerNorm(3)),
            "instance": lambda: nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True)),
            "frozen": lambda: nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout(0.5).eval()),
            "recurrent": lambda: nn.Sequential(nn.GRU(3, 3, num_layers=2, dropout=0.1)),
            "path": lambda: nn.Sequential(DropPath()),
        }}[kind]()
        return model if training else model.eval()
    class DropPath(nn.Module):
        drop_prob = 0.1
    def example_inputs():
        return torch.ones(2, 3)
""".replace("{{", "{").replace("}}", "}")


def load_mode(write, kind, *arguments, **options):
    return load_subject(TargetOptions(write("net.py", MODES), arguments=[f"kind={kind}", *arguments], **options))


@pytest.mark.parametrize(
    ("kind", "active"),
    [
        ("norms", "2 BatchNorm and 1 Dropout modules are"),
        ("instance", "1 InstanceNorm module is"),
        ("recurrent", "1 Dropout module is"),
        ("path", "1 Dropout module is"),
    ],
)
def test_training_mode_is_noted_where_it_matters(write, kind, active):
    (note,) = load_mode(write, kind).notes
    assert (note.code, note.severity) == ("GC105", "note")
    assert note.message == f"the model is in training mode: {active} active; add --eval or --train to select the mode"


@pytest.mark.parametrize(("kind", "arguments"), [("quiet", []), ("frozen", []), ("norms", ["training=False"])])
def test_training_mode_is_not_noted_where_it_does_not_matter(write, kind, arguments):
    assert load_mode(write, kind, *arguments).notes == ()


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_is_asked_for_is_set_and_not_noted(write, training):
    subject = load_mode(write, "norms", training=training)
    assert subject.notes == ()
    assert all(module.training is training for module in subject.model.modules())


# Loss


def test_a_loss_that_is_not_there_names_the_nearest(write):
    write("net.py", NET)
    assert message("net.py:Net", loss="squareloss") == (
        "GC113 --loss 'squareloss': net.py has no 'squareloss'. It defines Net, Net_inputs, square_loss, Scale (did "
        "you mean 'square_loss'?)."
    )


def test_a_loss_that_is_no_function_is_refused(write):
    write("net.py", NET)
    assert message("net.py:Net", loss="half") == (
        "GC113 --loss 'half': net.py:half is of type 'float', not a function of the outputs."
    )
    assert message("net.py:Net", loss="Scale") == (
        "GC113 --loss 'Scale': net.py:Scale is a class, not a function of the outputs."
    )


# Devices


def test_an_unknown_device_lists_the_kinds(write):
    assert message(write("net.py", NET), device="gpu") == (
        "GC106 'gpu' is no device. Write cpu, cuda, mps or xpu; of several, with a number: cuda:1."
    )


def test_the_meta_device_is_refused(write):
    write("net.py", NET + "\n    meta = nn.Linear(2, 2, device='meta')\n")
    assert message("net.py:Net", device="meta") == (
        "GC106 the device 'meta' holds no values to check. Give --device cpu."
    )
    assert message("net.py:meta", input_specs=["f32[2,2]"]) == (
        "GC109 net.py:meta has parameters on the device 'meta', which hold no values. Make it on the CPU."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_absent_says_why(write):
    said = message(write("net.py", NET), device="cuda")
    assert said.startswith("GC106 device 'cuda' cannot be used here (")
    assert said.endswith("). Give --device cpu, or see 'gradctl doctor'.")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_and_inputs_go_to_the_device(write):
    subject = load_subject(TargetOptions(write("net.py", NET) + ":Net", device="cuda"))
    assert {subject.model.fc.weight.device.type, subject.args[0].device.type} == {"cuda"}


# Weights


def test_weights_are_loaded_before_the_check(write, tmp_path):
    write("net.py", NET)
    state = nn.Linear(4, 3).state_dict()
    torch.save({f"fc.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    subject = load_subject(TargetOptions("net.py:Net", weights=tmp_path / "w.pt"))
    assert subject.model.fc.weight.equal(state["weight"])


# What the user meant, wrongly


def test_mistakes_in_the_options_are_found_before_anything_is_imported(write):
    write("net.py", "raise RuntimeError('imported')")
    for options, code in (
        ({"input_specs": ["x=f33[3]"]}, "GC104"),
        ({"arguments": ["width"]}, "GC108"),
        ({"device": "gpu"}, "GC106"),
        ({"provider": "gpu"}, "GC106"),
    ):
        with pytest.raises(TargetError) as caught:
            load_subject(TargetOptions("net.py", **options))
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "said"),
    [("make_model", "GC108 make_model() raised SystemExit: 0."), ("net", "GC104 net_inputs() raised SystemExit: 3.")],
)
def test_an_exit_of_the_users_own_is_no_exit_of_ours(write, name, said):
    write(
        "exits.py",
        """
        import sys
        from torch import nn

        net = nn.Linear(2, 2)

        def make_model():
            sys.exit(0)

        def net_inputs():
            sys.exit(3)
        """,
    )
    assert message(f"exits.py:{name}") == said
