"""README and docs match the repository: links and commands exist, code runs from the text, tables list all configs."""
import importlib.util
import re
import shlex

import pytest

from docs_commands import PAGES, blocks, commands
from experiments.runner import ROOT
from moejax import train
from moejax.routing import papers
from moejax.training import setup

README = ROOT / 'README.md'


def test_the_readme_is_a_page():
  assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_exist(page):
  links = re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)', page.read_text())
  assert not [link for link in links if not (page.parent / link).exists() and not link.startswith('api/')]


def test_every_page_is_in_the_navigation():
  nav = (ROOT / 'mkdocs.yml').read_text().split('nav:')[1]
  assert {path.name for path in (ROOT / 'docs').glob('*.md')} == set(re.findall(r' (\w+\.md)', nav))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_modules_and_configs_that_a_page_names_exist(page):
  text = page.read_text()
  assert not [name for name in re.findall(r'python3? -m ((?:moejax|experiments|tests)[\w.]*)', text)
              if importlib.util.find_spec(name.rstrip('.')) is None]
  if page.name != 'add_a_router.md':  # whose files are the reader's
    assert not [path for path in re.findall(r'\b(?:configs|examples|experiments|tests|colabs)/[\w/]+\.(?:py|sh|json|ipynb)', text)
                if not (ROOT / path).exists()]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_are_shell(page):
  for command in commands(page):
    assert shlex.split(command, comments=True)


def test_the_router_of_the_readme_is_one_that_trains(monkeypatch):
  """The code as it stands, up to the traced training step."""
  prepared = []
  monkeypatch.setattr(train, 'run', lambda config, workdir: prepared.append(setup.prepare(config)))
  code, = blocks(README, 'python')
  exec(code, {})
  assert prepared[0].config.model.moe.router.score.name == 'distance'


def test_the_router_that_the_conventions_spell_out_is_the_papers():
  spelled = {}
  exec(next(code for code in blocks(ROOT / 'docs/conventions.md', 'python') if code.startswith('router = ')), spelled)
  assert spelled['router'] == without_none(papers.vmoe(k=2))


def without_none(fragment):
  return {key: without_none(value) if isinstance(value, dict) else value for key, value in fragment.items()
          if value is not None}


def test_code_that_follows_a_token_is_the_example_s():
  example = {line.strip() for line in (ROOT / 'examples/mixtral.py').read_text().splitlines()}
  quoted = [line for code in blocks(ROOT / 'docs/one_token.md', 'python') for line in code.splitlines()]
  assert quoted and set(quoted) <= example


def test_every_published_config_is_listed_and_every_listed_config_exists():
  published = {path.stem for path in (ROOT / 'configs').glob('[!_]*.py') if 'Paper: Unpublished' not in path.read_text()}
  table = (ROOT / 'docs/configs.md').read_text().split('| config | paper |')[1].split('\n\n')[0]
  assert set(re.findall(r'`(\w+)`', table)) == published


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'bash')], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, tmp_path):
  from docs_commands import run
  run(page, tmp_path)
