"""What the README lists and spells out is what there is."""
import re

from experiments.runner import ROOT
from moejax import systems
from moejax.routing import papers

TEXT = (ROOT / 'README.md').read_text()


def test_the_router_that_the_readme_spells_out_is_the_papers():
  spelled = {}
  block = next(block for block in re.findall(r'```python\n(.*?)```', TEXT, re.S) if block.startswith('router = '))
  exec(block, spelled)
  assert spelled['router'] == {key: value for key, value in strip_none(papers.vmoe(k=2)).items()}


def strip_none(fragment):
  return {key: strip_none(value) if isinstance(value, dict) else value for key, value in fragment.items()
          if value is not None}


def test_every_config_that_the_readme_lists_exists_and_all_of_papers_are_listed():
  table = TEXT.split('| config | paper |')[1].split('\n\n')[0]
  listed = set(re.findall(r'`(\w+)`', table))
  configs = {path.stem: systems.sections(path.read_text()).get('Paper', '') for path in (ROOT / 'configs').glob('*.py')}
  assert listed - configs.keys() == set()
  assert {name for name, paper in configs.items() if not paper.startswith('Unpublished')} - listed == set()
