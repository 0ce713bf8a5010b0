"""The systems that moejax reproduces: paper, config, proof, what was measured, and where paper and code differ.

    python -m moejax.systems            prints the table
    python -m moejax.systems --write    writes it to docs/systems.md
    python -m moejax.systems | less     reads it page by page

A row is the docstring of the system's config, the one with a `System:` line; measured effects are those of
experiments/paper_effects/summary.json, as they were where the package was built.
"""
import ast
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

from moejax import command_line
from moejax.config import ConfigError
from moejax.config_files import ROOT, SCHEME

KEYS = ('System', 'Paper', 'Command', 'Cost', 'Result', 'Expected', 'Proof', 'Differs')
# How independent of ours what proves a system is, the strongest first.
PROOFS = {
    'implementation': 'an implementation that no one here wrote, run in the test',
    'numbers': 'numbers derived by hand, or by a loop over tokens in float64',
    'identities': 'identities that the paper implies',
}


@dataclasses.dataclass(frozen=True)
class System:
  """One row.

  Attributes:
    name: as the field calls it.
    paper: authors, year, title, arXiv id, section.
    config: the file, from the root of the repository.
    proof: one of `PROOFS`.
    tests: `tests/file.py::test` that prove it.
    differs: where paper and published code disagree, and which is followed.
    result: what the config's docstring says of a run.
    effects: `experiments.paper_effects` of this system, as in summary.json.
  """
  name: str
  paper: str
  config: str
  proof: str
  tests: tuple[str, ...]
  differs: str
  result: str
  effects: tuple[dict, ...]


def sections(docstring: str) -> dict[str, str]:
  """`{key: text}` of the lines of a config's docstring that begin with one of `KEYS`; continuation lines are indented.

  >>> sections('A config.\\n\\nSystem: X\\nPaper: A 2020,\\n  "T" (arXiv 2001.00001)\\n')
  {'System': 'X', 'Paper': 'A 2020, "T" (arXiv 2001.00001)'}
  """
  pattern = rf'^({"|".join(KEYS)}): (.*(?:\n  +\S.*)*)'
  return {key: re.sub(r'\s+', ' ', text).strip() for key, text in re.findall(pattern, docstring, re.M)}


def systems(root: pathlib.Path = ROOT) -> list[System]:
  """All systems, by year of the paper.

  Raises:
    ValueError: a row that is not whole, or a proof that names a test file that does not exist.
  """
  return sorted(_rows(root), key=lambda system: (re.findall(r'arXiv (\d+\.\d+)', system.paper), system.name))


def _rows(root: pathlib.Path) -> Iterator[System]:
  path = root / 'experiments/paper_effects/summary.json'
  effects = list(json.loads(path.read_text()).values()) if path.exists() else []
  for config in sorted(root.glob('configs/[!_]*.py')):
    text = sections(ast.get_docstring(ast.parse(config.read_text())) or '')
    if 'System' not in text:
      continue
    where = config.relative_to(root).as_posix()
    if missing := [key for key in ('Paper', 'Proof', 'Differs') if key not in text]:
      raise ValueError(f'{where}: the row of {text["System"]} lacks {", ".join(missing)}.')
    kind, _, names = text['Proof'].partition(':')
    tests = tuple(name.strip(' .') for name in names.split(', '))
    exist = not (root / 'tests').is_dir() or all((root / test.partition('::')[0]).is_file() for test in tests)
    if kind not in PROOFS or not exist:
      raise ValueError(f'{where}: Proof must be one of {", ".join(PROOFS)}, a colon, and tests that exist, as '
                       f'tests/<file>.py::<test>, with commas between; not {text["Proof"]!r}.')
    yield System(name=text['System'].rstrip('.'), paper=text['Paper'], config=where, proof=kind, tests=tests,
                 differs=text['Differs'], result=text.get('Result') or text.get('Expected', ''),
                 effects=tuple(effect for effect in effects if effect['system'] == text['System'].rstrip('.')))


def measured(system: System) -> str:
  """What was measured of it, in words."""
  return ' '.join(_words(effect) for effect in system.effects) or 'Not measured yet.'


def _words(effect: dict) -> str:
  def value(variant):
    numbers = effect['values'][variant]
    return f'{variant} {numbers["mean"]:.4g} ± {numbers["deviation"]:.2g}'
  factor = '' if effect['at_least'] == 1 else f' at least {effect["at_least"]:g} times'
  return (f'{effect["claim"]} **{effect["verdict"].capitalize()}**: `{effect["metric"]}` {value(effect["larger"])}, '
          f'expected above{factor} {value(effect["smaller"])}; {effect["seeds"]} seeds.')


def markdown(rows: list[System]) -> str:
  """docs/systems.md."""
  lines = ['# Systems', '',
           'Made by `python -m moejax.systems --write` from the docstrings of the configs and from '
           '`experiments/paper_effects/summary.json`; not written by hand. Proofs, the strongest first:', '']
  lines += [f'- *{kind}*: {meaning}' for kind, meaning in PROOFS.items()]
  verdicts = [effect['verdict'] for row in rows for effect in row.effects]
  counts = ', '.join(f'{verdicts.count(verdict)} {verdict}' for verdict in ('shown', 'not shown', 'opposite'))
  lines += ['', 'An effect is *shown* where what the paper reports holds in every seed at a size of seconds, '
            '*opposite* where the reverse does, and else *not shown*: small runs are evidence about small runs. '
            f'Of {len(verdicts)} claims: {counts}.', '',
            '| system | paper | config | proven by | measured here | where paper and code differ |', '|---' * 6 + '|']
  for row in rows:
    # Several parameters of one test, and names of its class, say little in a table.
    tests = ', '.join(f'[{name.rpartition("::")[2] or name}](../{name.partition("::")[0]})' for name in row.tests)
    cells = [row.name, row.paper, f'[{pathlib.Path(row.config).stem}](../{row.config})', f'*{row.proof}*: {tests}',
             measured(row), row.differs]
    lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  """Prints or writes the table."""
  flags = command_line.Parser('moejax.systems', __doc__)
  flags.add_argument('--write', action='store_true', help='write docs/systems.md')
  write = flags.parse().write
  rows = systems()
  if write:
    if not (ROOT / 'docs').is_dir():
      raise ConfigError('--write is for a checkout: docs/systems.md is no part of the installed package.')
    path = ROOT / 'docs/systems.md'
    path.write_text(markdown(rows))
    print(f'{path.relative_to(ROOT)}: {len(rows)} systems, {sum(bool(row.effects) for row in rows)} of them measured.')
    return
  for row in rows:
    print(f'{row.name}\n  paper      {row.paper}\n  config     {SCHEME}{pathlib.Path(row.config).stem}\n'
          f'  proven by  {row.proof}: {", ".join(row.tests)}\n'
          f'  measured   {measured(row)}\n  differs    {row.differs}\n')
  print(f'{len(rows)} systems. Train one: python -m moejax.train --config=<config> --workdir=runs/<name>')


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
