"""Imports run downwards: a room of moejax imports only from itself and from floors below its own.

Oracle: the picture. What one program imports inside a function, or only for its types, counts as well: a reader follows it.
"""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The house, from the commands down. Rooms of a floor are independent: none imports another.
HOUSE = '''
    train  evaluate  plan  describe  systems
    analysis  planning  surgery
    training
    evaluation  checkpoints
    models
    layers
    dispatch
    routing  experts
    data  kernels
    command_line
    parallel  config_files  json_lines
    buckets
    config  functional  random  units  shorten  streams  platforms
    annotations
    ranges
'''
FLOOR = {room: -floor for floor, rooms in enumerate(HOUSE.split('\n')) for room in rooms.split()}
FILES = sorted((ROOT / 'moejax').rglob('*.py'))


def room(path):
  """'routing' of moejax/routing/papers/vmoe.py, 'train' of moejax/train.py."""
  return path.relative_to(ROOT / 'moejax').parts[0].removesuffix('.py')


def imported(source):
  """[(line, room)] of the imports from moejax."""
  found = []
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: a relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    found += [(node.lineno, name.split('.')[1]) for name in names if name.startswith('moejax.')]
  return found


def test_every_import_runs_down():
  up = [f'{path.relative_to(ROOT)}:{line} imports {other}' for path in FILES
        for line, other in imported(path.read_text())
        if other != room(path) and FLOOR[other] >= FLOOR[room(path)]]
  assert not up


def test_the_picture_shows_every_room_once():
  assert sorted(HOUSE.split()) == sorted({room(path) for path in FILES} - {'__init__'})


@pytest.mark.parametrize('source, rooms', [
    ('from moejax import config, units', ['config', 'units']),
    ('from moejax.routing.papers import vmoe', ['routing']),
    ('import moejax.layers.moe as moe', ['layers']),
    ('def f():\n  from moejax.training import loop', ['training']),
    ('if TYPE_CHECKING:\n  from moejax.models.output import ModelOutput', ['models']),
    ('import jax\nfrom moejaxlike import config', [])])
def test_imports_are_found_wherever_they_stand(source, rooms):
  assert [room for _, room in imported(source)] == rooms
