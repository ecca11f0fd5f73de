from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors  # noqa: F401  # a library that is imported already
import torch
from torch import nn

from gradctl.core.errors import TargetError
from gradctl.core.target_files import parse_target
from gradctl.subject.loading.arguments import parse_arguments
from gradctl.subject.loading.factory import KnownInputs, build_model
from gradctl.subject.loading.target import find_target, import_target, on_import_path

NET = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def forward(self, x):
            return x

    class Net(nn.Module):
        def __init__(self, width, depth=2, bias=True):
            super().__init__()
            self.width, self.depth, self.bias = width, depth, bias
            self.layers = nn.Sequential(*(nn.Linear(width, width, bias=bias) for _ in range(depth)))

        def forward(self, x):
            return self.layers(x)

    def make_net(width: int = 3) -> Net:
        return Net(width)

    net = Net(5)
"""


def found(text):
    target = parse_target(text)
    with on_import_path(target.root):
        return find_target(target, import_target(target))


def built(text, *arguments, inputs=KnownInputs()):
    name, value = found(text)
    return build_model(value, name, parse_arguments(arguments), inputs)


def message(text, *arguments, inputs=KnownInputs()):
    with pytest.raises(TargetError) as caught:
        built(text, *arguments, inputs=inputs)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What is named


def test_a_module_instance_is_the_model(write):
    assert built(write("net.py", NET) + ":net").width == 5


def test_a_class_is_made_with_its_arguments(write):
    net = built(write("net.py", NET) + ":Net", "width=4", "depth=1")
    assert (net.width, net.depth) == (4, 1)


def test_a_factory_is_called(write):
    assert built(write("net.py", NET) + ":make_net").width == 3
    assert built("net.py:make_net", "width=7").width == 7


def test_a_dotted_name_goes_into_a_model(write):
    layer = built(write("net.py", NET) + ":net.layers.1")
    assert isinstance(layer, nn.Linear)


def test_a_function_of_another_library_is_a_function_of_tensors():
    assert built("torch.nn.functional:relu") is nn.functional.relu
    assert built("torch:mm") is torch.mm


def test_an_autograd_function_is_its_apply(write):
    write(
        "square.py",
        """
        import torch

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * x
        """,
    )
    assert built("square.py:Square")(torch.tensor([3.0])) == 9


# Without a name


def test_without_a_name_make_model_comes_before_model(write):
    write(
        "net.py",
        """
        from torch import nn
        model = nn.Linear(1, 1)
        def make_model():
            return nn.Linear(2, 2)
        """,
    )
    assert built("net.py").in_features == 2


def test_without_make_model_model_is_taken(write):
    write("net.py", "from torch import nn\nmodel = nn.Linear(1, 1)\nclass Net(nn.Module): ...\n")
    assert built("net.py").in_features == 1


def test_without_both_the_only_module_class_is_taken_and_imported_ones_do_not_count(write):
    write("net.py", "from torch import nn\nfrom torch.nn import Linear, ReLU\nclass Net(nn.Module): ...\nAlias = Net\n")
    assert type(built("net.py")).__name__ == "Net"


def test_two_module_classes_are_listed(write):
    write("net.py", "from torch import nn\nclass Block(nn.Module): ...\nclass Net(nn.Module): ...\n")
    assert message("net.py") == (
        "GC102 net.py has no make_model and no model, and 2 modules: Block, Net. Say which one: net.py:Net."
    )


def test_a_file_without_a_model_lists_what_it_defines(write):
    write("loss.py", "def energy(x): ...\ndef force(x): ...\n")
    assert message("loss.py") == (
        "GC102 loss.py has no make_model, no model and no nn.Module class of its own. Name what it defines "
        "(energy, force): loss.py:NAME."
    )
    write("empty.py", "")
    assert message("empty.py") == (
        "GC102 empty.py has no make_model, no model and no nn.Module class of its own. Add one: empty.py:NAME."
    )


# Names that are wrong


def test_an_unknown_name_lists_the_nearest(write):
    write("net.py", NET)
    assert message("net.py:Nett") == (
        "GC102 net.py has no 'Nett'. It defines Block, Net, make_net, net (did you mean 'Net'?)."
    )


def test_of_many_names_only_the_nearest_is_named(write):
    write("many.py", "".join(f"def layer_{letter}(x): ...\n" for letter in "abcdefghij"))
    assert message("many.py:layer_k").startswith("GC102 many.py has no 'layer_k' (did you mean 'layer_")
    assert message("many.py:zzz") == "GC102 many.py has no 'zzz'."


def test_an_unknown_part_of_a_dotted_name_lists_what_the_model_has(write):
    write("net.py", NET)
    assert message("net.py:net.layer") == "GC102 net.py:net has no 'layer'. It has layers (did you mean 'layers'?)."


@pytest.mark.parametrize("name", ["", "make model", "Net()", "net.", "-1"])
def test_what_is_no_name_is_refused(write, name):
    write("net.py", NET)
    assert message(f"net.py:{name}") == (
        f"GC102 {name!r} after the colon of 'net.py:{name}' is not a name. Write FILE.py:NAME."
    )


# Files and modules that are not there


def test_a_missing_file_names_the_nearest_and_where_paths_start(write, tmp_path):
    write("net.py", NET)
    assert message("nett.py:Net") == (
        f"GC101 there is no file 'nett.py' (did you mean 'net.py'?). Paths start at {str(tmp_path)!r}."
    )


def test_a_missing_folder_is_named(write):
    assert message("models/net.py") == "GC101 there is no file 'models/net.py': there is no folder 'models'."


def test_a_folder_lists_its_files(write, tmp_path):
    write("models/a.py", "")
    write("models/b.py", "")
    (tmp_path / "nothing").mkdir()
    assert message("models") == "GC101 'models' is a folder; name a file in it. In it: a.py, b.py."
    assert message("nothing/") == "GC101 'nothing' is a folder; name a file in it. It holds no .py file."


def test_a_file_that_is_not_python_is_refused(write):
    write("net.pt", "")
    assert message("net.pt") == "GC101 'net.pt' is not a Python file. Name the .py file that makes the model."


def test_a_missing_module_names_the_nearest(write):
    write("models/__init__.py", "")
    write("models/encoder.py", "")
    assert message("models.encoders:Net") == (
        "GC101 there is no module 'models.encoders': python finds no 'encoders' in 'models' (did you mean 'encoder'?). "
        "Write FILE.py:NAME, or start in the folder that holds the package."
    )
    assert message("modelz:Net") == (
        "GC101 there is no module 'modelz': python finds no 'modelz' (did you mean 'models'?). Write FILE.py:NAME, or "
        "start in the folder that holds the package."
    )


def test_what_is_neither_a_file_nor_a_module_is_refused(write):
    assert message(":Net") == "GC101 '' is neither a file nor a module. Write FILE.py:NAME or MODULE:NAME."
    assert message("net-2:Net") == ("GC101 'net-2' is neither a file nor a module. Write FILE.py:NAME or MODULE:NAME.")


def test_a_name_that_no_file_can_have_is_refused():
    assert message("x" * 300 + ".py") == f"GC101 '{'x' * 300}.py' cannot be looked up: File name too long."


# Importing


def test_a_file_in_a_package_is_imported_as_part_of_it(write):
    write("pkg_a/__init__.py", "")
    write("pkg_a/sub/__init__.py", "")
    write("pkg_a/sizes.py", "WIDTH = 6")
    write("pkg_a/sub/net.py", "from torch import nn\nfrom ..sizes import WIDTH\nmodel = nn.Linear(WIDTH, 1)\n")
    assert built("pkg_a/sub/net.py").in_features == 6
    assert built("pkg_a.sub.net:model") is built("pkg_a/sub/net.py:model")


def test_a_package_itself_is_a_target_by_file_and_by_name(write):
    write("pkg_b/__init__.py", "from torch import nn\nmodel = nn.Linear(4, 1)\n")
    assert built("pkg_b/__init__.py").in_features == 4
    assert built("pkg_b:model").in_features == 4
    assert built("pkg_b").in_features == 4


def test_a_plain_file_imports_its_neighbours_also_when_a_function_is_called_later(write):
    write("lib/sizes_of_net.py", "WIDTH = 6")
    write("lib/later_sizes.py", "WIDTH = 8")
    write(
        "lib/net.py",
        """
        from torch import nn
        from sizes_of_net import WIDTH
        model = nn.Linear(WIDTH, 1)
        def later():
            from later_sizes import WIDTH
            return nn.Linear(WIDTH, 1)
        """,
    )
    before = list(sys.path)
    assert built("lib/net.py").in_features == 6
    assert built("lib/net.py:later").in_features == 8
    assert sys.path[: len(before)] == before  # the user's folder shadows nothing that is imported later


def test_two_files_of_one_name_are_two_modules(write):
    write("one/net.py", "from torch import nn\nmodel = nn.Linear(1, 1)\n")
    write("two/net.py", "from torch import nn\nmodel = nn.Linear(2, 1)\n")
    assert (built("one/net.py").in_features, built("two/net.py").in_features) == (1, 2)


@pytest.mark.parametrize("name", ["random", "wave", "safetensors"])
def test_a_file_named_like_another_module_does_not_replace_it(write, name):
    there = sys.modules.get(name)  # of these, wave is not imported yet
    write(f"{name}.py", "from torch import nn\nmodel = nn.Linear(1, 1)\n")
    assert built(f"{name}.py").in_features == 1
    assert sys.modules.get(name) is there


def test_a_file_with_dots_and_dashes_in_its_name_is_imported(write):
    assert built(write("net-1.5.py", "from torch import nn\nmodel = nn.Linear(1, 1)\n")).in_features == 1


def test_a_dataclass_in_a_plain_file_finds_its_module(write):
    write(
        "net.py",
        """
        from __future__ import annotations
        import dataclasses
        from torch import nn

        @dataclasses.dataclass
        class Sizes:
            width: int = 3

        model = nn.Linear(Sizes().width, 1)
        """,
    )
    assert built("net.py").in_features == 3


def test_a_package_whose_name_is_taken_is_refused_instead_of_mistaken(write):
    write("json/__init__.py", "")
    write("json/decoder.py", "from torch import nn\nmodel = nn.Linear(1, 1)\n")
    assert message("json/decoder.py") == (
        f"GC103 json/decoder.py would be imported as 'json.decoder', but python has {Path(json.__file__).parent} under "
        "the name 'json'. Rename the folder of the package, or remove its __init__.py."
    )


# Code of the user's that raises


def details(text, *arguments):
    with pytest.raises(TargetError) as caught:
        built(text, *arguments)
    # Versions of python differ in where they put the marks below a line.
    return "\n".join(line for line in caught.value.details.splitlines() if line.strip(" ^~"))


def test_an_error_on_import_shows_only_the_users_frames(write, tmp_path):
    write("sizes_that_fail.py", "def width():\n    return sizes['large']\n")
    write("net.py", "from sizes_that_fail import width\nWIDTH = width()\n")
    assert message("net.py") == "GC103 net.py cannot be imported: NameError: name 'sizes' is not defined."
    assert details("net.py") == (
        "Traceback (most recent call last):\n"
        f'  File "{tmp_path}/net.py", line 2, in <module>\n'
        "    WIDTH = width()\n"
        f'  File "{tmp_path}/sizes_that_fail.py", line 2, in width\n'
        "    return sizes['large']\n"
        "NameError: name 'sizes' is not defined"
    )


def test_a_syntax_error_shows_its_line(write, tmp_path):
    write("net.py", "import torch\n\ndef make_model(:\n    pass\n")
    assert message("net.py") == "GC103 net.py cannot be imported: SyntaxError: invalid syntax (net.py, line 3)."
    assert details("net.py") == (
        f'  File "{tmp_path}/net.py", line 3\n    def make_model(:\nSyntaxError: invalid syntax'
    )


def test_a_missing_library_is_to_be_installed(write):
    write("net.py", "import library_that_is_not_there\n")
    assert message("net.py") == (
        "GC103 net.py cannot be imported: ModuleNotFoundError: No module named 'library_that_is_not_there'. Install it "
        "beside gradctl, or start where python finds 'library_that_is_not_there'."
    )


def test_a_relative_import_in_a_plain_file_needs_a_package(write):
    write("net.py", "from .layers import Layer\n")
    assert message("net.py") == (
        "GC103 net.py cannot be imported: ImportError: attempted relative import with no known parent package. "
        "Relative imports need an __init__.py in the folder of the file."
    )


def test_a_script_that_exits_is_told_to_guard_its_end(write):
    write("train.py", "import sys\nsys.exit(3)\n")
    assert message("train.py") == (
        "GC103 train.py cannot be imported: it called sys.exit(3). Put what it does as a script under: "
        "if __name__ == '__main__'."
    )


def test_a_constructor_that_raises_names_its_arguments_and_shows_the_users_frames(write, tmp_path):
    write(
        "net.py",
        """
        from torch import nn
        class Net(nn.Module):
            def __init__(self, width):
                super().__init__()
                if width % 2:
                    raise ValueError("width must be even.\\nIt is not.")
        """,
    )
    assert message("net.py:Net", "width=3") == "GC108 Net(width=3) raised ValueError: width must be even."
    assert details("net.py:Net", "width=3") == (
        "Traceback (most recent call last):\n"
        f'  File "{tmp_path}/net.py", line 6, in __init__\n'
        '    raise ValueError("width must be even.\\nIt is not.")\n'
        "ValueError: width must be even.\n"
        "It is not."
    )


def test_running_out_of_memory_is_no_fault_of_the_constructor(write):
    write("net.py", "def make_model():\n    raise MemoryError\n")
    with pytest.raises(MemoryError):
        built("net.py")


# Arguments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("True", True),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ("relu", "relu"),
        ("'3'", "3"),
        ("", ""),
    ],
)
def test_an_argument_is_a_literal_or_else_its_text(text, value):
    assert parse_arguments([f"key={text}"]) == {"key": value}


@pytest.mark.parametrize("text", ["width", "=3", "my-width=3"])
def test_what_is_not_key_and_value_is_refused(text):
    with pytest.raises(TargetError) as caught:
        parse_arguments([text])
    assert str(caught.value) == f"GC108 {text!r} is not KEY=VALUE. Write, for example, --arg width=64."


def test_an_argument_given_twice_is_refused():
    with pytest.raises(TargetError) as caught:
        parse_arguments(["width=3", "width=4"])
    assert str(caught.value) == "GC108 argument 'width' is given twice. Give it once."


def test_an_unknown_argument_names_the_nearest(write):
    write("net.py", NET)
    assert message("net.py:Net", "widht=3") == (
        "GC108 Net has no argument 'widht' (did you mean 'width'?). It takes width, depth, bias."
    )
    write("bare.py", "def make_model(): ...")
    assert message("bare.py", "n=3") == "GC108 make_model has no argument 'n'. It takes no arguments."


def test_a_missing_argument_shows_the_option_to_type(write):
    write("net.py", NET)
    assert message("net.py:Net") == "GC108 Net needs 'width'. Add --arg width=VALUE."
    write("two.py", "def make_model(width: int, act: str, depth=3): ...")
    assert message("two.py") == (
        "GC108 make_model needs 'width' and 'act'. Add --arg width=INT --arg act=STR. If make_model is a function of "
        "tensors, use --input instead."
    )


def test_an_argument_that_no_text_can_give_wants_a_factory(write):
    write(
        "net.py",
        """
        from torch import nn
        class Config: ...
        class Net(nn.Module):
            def __init__(self, config: Config): ...
        """,
    )
    assert message("net.py:Net") == (
        "GC108 Net needs 'config'. --arg gives only Python literals: write a function make_model() that returns Net(…)."
    )


def test_a_word_for_a_flag_is_refused_as_every_word_is_true(write):
    write("net.py", NET)
    assert message("net.py:Net", "width=3", "bias=false") == (
        "GC108 argument 'bias' of Net is True or False, and 'false' is a word."
    )


def test_any_argument_is_given_to_a_factory_that_takes_any(write):
    write("net.py", "from torch import nn\ndef make_model(**sizes):\n    return nn.Linear(**sizes)\n")
    assert built("net.py", "in_features=3", "out_features=2").out_features == 2


def test_positional_only_arguments_are_given_by_position(write):
    write("net.py", "from torch import nn\ndef make_model(a=1, b=2, /):\n    return nn.Linear(a, b)\n")
    assert built("net.py", "b=5").out_features == 5


def test_arguments_for_a_finished_model_are_refused(write):
    write("net.py", NET)
    assert message("net.py:net", "width=3") == (
        "GC108 'net' is neither a class nor a factory: it has no constructor arguments. Leave out --arg width."
    )
    assert message("torch:relu", "inplace=True") == (
        "GC108 'relu' is taken as a function of tensors: it has no constructor arguments. Give --input "
        "'inplace=True' instead."
    )


# A factory, or a function of tensors

FUNCTIONS = """
    import torch
    from torch import Tensor, nn

    def nothing_needed(): return nn.Linear(1, 1)
    def says_module(width) -> nn.Module: return nn.Linear(width, 1)
    def plain_types(width: int, bias: bool): return nn.Linear(width, 1, bias=bias)
    def unknown_types(x, y): return x * y
    def mixed_types(x: Tensor, n: int): return x * n
    def says_tensor(x=None) -> Tensor: return x
    def all_optional(x=None, y=None): return x
    def any_number(*xs): return sum(xs)
    def unresolved(x: "NotThere"): return x
"""


@pytest.mark.parametrize(
    ("name", "arguments", "inputs"),
    [
        ("nothing_needed", [], KnownInputs()),
        ("says_module", ["width=3"], KnownInputs(frozenset({"width"}), True)),
        ("plain_types", ["width=3", "bias=True"], KnownInputs()),
    ],
)
def test_a_factory_gives_the_model(write, name, arguments, inputs):
    write("functions.py", FUNCTIONS)
    assert isinstance(built(f"functions.py:{name}", *arguments, inputs=inputs), nn.Linear)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("unknown_types", KnownInputs()),
        ("mixed_types", KnownInputs()),
        ("plain_types", KnownInputs(are_given=True)),
        ("says_tensor", KnownInputs()),
        ("all_optional", KnownInputs(frozenset({"x"}), True)),
        ("any_number", KnownInputs()),
        ("unresolved", KnownInputs()),
    ],
)
def test_a_function_of_tensors_is_the_model(write, name, inputs):
    write("functions.py", FUNCTIONS)
    assert built(f"functions.py:{name}", inputs=inputs).__name__ == name


def test_a_factory_of_plain_types_lacks_its_arguments(write):
    write("functions.py", FUNCTIONS)
    assert message("functions.py:plain_types") == (
        "GC108 plain_types needs 'width' and 'bias'. Add --arg width=INT --arg bias=BOOL. If plain_types is a function "
        "of tensors, use --input instead."
    )


def test_a_factory_may_give_a_function_of_tensors(write):
    write("net.py", "import torch\ndef make_model():\n    return torch.sin\n")
    assert built("net.py") is torch.sin


def test_a_factory_may_give_a_function_class(write):
    write("net.py", "import torch\nclass F(torch.autograd.Function): ...\ndef make_model():\n    return F\n")
    assert built("net.py").__self__.__name__ == "F"


# What is no model


def test_a_factory_that_gives_no_model_is_told_what_it_gives(write):
    write(
        "net.py",
        """
        import torch
        from torch import nn
        def nothing(): ...
        def both(): return nn.Linear(1, 1), torch.ones(1)
        def number(): return 3
        answer = 42
        class Plain: ...
        """,
    )
    assert message("net.py:nothing") == "GC109 nothing() is None. Return the model from it."
    assert message("net.py:both") == (
        "GC109 both() is a tuple of 2. Return the model alone, and the inputs from example_inputs()."
    )
    assert message("net.py:number") == (
        "GC109 number() is of type 'int'. Name an nn.Module, a function of tensors, or what makes one."
    )
    assert message("net.py:answer") == (
        "GC109 'answer' is of type 'int'. Name an nn.Module, a function of tensors, or what makes one."
    )
    assert message("net.py:Plain") == (
        "GC109 'Plain' is a class, but neither an nn.Module nor an autograd.Function. Name one of these, or a function "
        "that makes one."
    )
