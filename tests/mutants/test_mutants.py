"""The planted faults can still be planted: the code that each of them changes is there, and Python as well."""
import ast

import pytest

from tests.mutants.planted import MUTANTS, ROOT


@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda mutant: mutant.name)
def test_it_changes_code_that_is_there(mutant):
  assert ast.dump(ast.parse(mutant.planted())) != ast.dump(ast.parse((ROOT / mutant.path).read_text()))


def test_names_are_unique():
  assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
