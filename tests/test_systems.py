"""The table of systems: whole rows, proofs that exist, and a document that is what the configs and results say."""
import ast
import json
import pathlib

import pytest

from moejax import systems

ROWS = systems.systems()


def test_the_document_is_what_the_configs_and_results_say():
  written, told = (systems.ROOT / 'docs/systems.md').read_text(), systems.markdown(ROWS)
  assert written == told, 'docs/systems.md is old: run python -m moejax.systems --write'


def test_no_two_configs_are_the_row_of_one_system():
  names = [row.name for row in ROWS]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
def test_what_proves_a_system_is_a_test_that_exists(row):
  for name in row.tests:
    path, *parts = name.split('::')
    node = ast.parse((systems.ROOT / path).read_text())
    for part in parts:
      children = [child for child in node.body if getattr(child, 'name', None) == part.partition('[')[0]]
      assert children, f'{path} has no {part}'
      node = children[0]


def test_every_effect_is_of_a_system_in_the_table():
  summary = json.loads((systems.ROOT / 'experiments/paper_effects/summary.json').read_text())
  assert {effect['system'] for effect in summary.values()} <= {row.name for row in ROWS}


def test_a_row_that_is_not_whole_says_what_it_lacks(tmp_path):
  (tmp_path / 'tests').mkdir()
  config = tmp_path / 'configs/mine.py'
  config.parent.mkdir()
  config.write_text('"""Mine.\n\nSystem: Mine\nPaper: Me (arXiv 2401.00001)\nDiffers: nothing known\n"""')
  with pytest.raises(ValueError, match='configs/mine.py: the row of Mine is missing Proof'):
    systems.systems(tmp_path)
  config.write_text(config.read_text().replace('Differs', 'Proof: identities: tests/gone.py::test_it\nDiffers'))
  with pytest.raises(ValueError, match='existing tests separated by commas'):
    systems.systems(tmp_path)


def test_an_unpublished_router_is_the_last_row(tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'test_it.py').write_text('')
  for file, name, paper in (('a', 'Mine', 'Unpublished.'), ('b', 'Old', 'Me 1994'), ('c', 'New', 'Me (arXiv 2401.00001)')):
    (tmp_path / f'configs/{file}.py').write_text(
        f'"""A config.\n\nSystem: {name}\nPaper: {paper}\nProof: numbers: test_it.py::test_it\nDiffers: nothing\n"""')
  rows = systems.systems(tmp_path)
  assert [row.name for row in rows] == ['Old', 'New', 'Mine']
  assert '| Mine | Unpublished. |' in systems.markdown(rows)


def test_an_effect_is_told_with_its_numbers_and_its_verdict(tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'tests').mkdir()
  (tmp_path / 'tests/test_it.py').write_text('')
  (tmp_path / 'configs/mine.py').write_text(
      '"""Mine.\n\nSystem: Mine\nPaper: Me (arXiv 2401.00001)\nProof: numbers: tests/test_it.py::test_it\n'
      'Differs: nothing\n"""')
  folder = pathlib.Path(tmp_path / 'experiments/paper_effects')
  folder.mkdir(parents=True)
  values = dict(a=dict(mean=2., deviation=0.5), b=dict(mean=1., deviation=0.25))
  (folder / 'summary.json').write_text(json.dumps(dict(mine=dict(
      system='Mine', claim='a is larger.', verdict='shown', larger='a', smaller='b', at_least=1.5, seeds=3, metric='x',
      values=values))))
  row, = systems.systems(tmp_path)
  assert systems.measured(row) == (
      'a is larger. **Shown**: `x` a 2 ± 0.5, expected above at least 1.5 times b 1 ± 0.25; 3 seeds.')
