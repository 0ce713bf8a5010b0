"""A class name stands for one thing in the package, so that a search for it finds one definition."""
import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_class_names_are_unique():
  places = collections.defaultdict(list)
  for path in sorted((ROOT / 'moejax').rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ClassDef):
        places[node.name].append(f'{path.relative_to(ROOT)}:{node.lineno}')
  repeated = {name: found for name, found in places.items() if len(found) > 1}
  assert repeated == {}
