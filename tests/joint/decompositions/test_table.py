"""The table of all families: none hides an operator of another, or of torch's own decompositions."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

from torch._decomp import core_aten_decompositions

from gradctl.joint import decompositions
from gradctl.joint.decompositions import TABLE, complex_numbers

TABLES = {
    each.name: getattr(importlib.import_module(f"{decompositions.__name__}.{each.name}"), "TABLE", {})
    for each in pkgutil.iter_modules(decompositions.__path__)
}


def test_an_operator_has_one_family_beside_that_of_complex_numbers():
    counted = Counter(operator for name, table in TABLES.items() if name != "complex_numbers" for operator in table)
    assert not [operator for operator, count in counted.items() if count > 1]
    assert {*counted, *complex_numbers.TABLE} == set(TABLE)


def test_what_torch_decomposes_is_not_left_whole_for_the_sake_of_complex_numbers():
    others = {operator for name, table in TABLES.items() if name != "complex_numbers" for operator in table}
    assert not complex_numbers.TABLE.keys() & core_aten_decompositions().keys() - others
