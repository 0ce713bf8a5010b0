"""Packs any source into ArrayRecord files, which allow random access from any disk.

    python -m moejax.data.pack --to=digits --source.name=digits
    python -m moejax.data.pack --to=packed --shards=64 --source.name=jsonl --source.files='{"train": "web/*.jsonl"}'
    python -m moejax.data.pack --to=packed/books --source.name=text --source.files.train='books/*.txt'

Keys of `--source.` are those of `config.data.source`. Exit codes are those of moejax.train.
"""
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from moejax import command_line, config_files
from moejax.config import ConfigError
from moejax.data import SOURCES, records
from moejax.data.files import is_url
from moejax.data.source import DataError, Example, Source, Stream, decoding, place


def pack(source: Source, folder: str, shards: int = 1, config: Mapping | None = None) -> dict[str, int]:
  """Writes all splits of `source` into `folder`, which appears only once it is complete; returns {split: examples}.

  Raises DataError if `folder` holds something already, or cannot be written.
  """
  if shards < 1:
    raise ConfigError(f'--shards must be 1 or more, not {shards}.')
  if is_url(folder):
    raise DataError(f'--to: {folder} is a URL. Pack into a folder, and copy that (gcloud storage cp, aws s3 sync).')
  folder = os.path.abspath(os.path.expanduser(folder))
  if os.path.exists(os.path.join(folder, records.INFO)):
    raise DataError(f'{folder} already holds packed data. Choose another folder, or delete it.')
  if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
    raise DataError(f'{folder} is a file, or holds files other than packed data. Choose another folder, or '
                    'delete it.')
  parent, name = os.path.split(folder)
  try:
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=parent) as unfinished:
      whole = os.path.join(unfinished, name)
      os.mkdir(whole)
      counts = {split: _write(source.open(split), whole, split, shards) for split in source.splits}
      info = {'examples': counts, 'num_classes': source.num_classes, 'source': dict(config or {})}
      with open(os.path.join(whole, records.INFO), 'w', encoding='utf-8') as file:
        json.dump(info, file, indent=2)
      os.rename(whole, folder)
  except (OSError, RuntimeError) as error:  # RuntimeError: from ArrayRecord's writer
    raise DataError(f'{folder} cannot be written ({(str(error).splitlines() or [""])[0]}).') from error
  return counts


def _write(examples: Any, folder: str, split: str, shards: int) -> int:
  names = [f'{split}-{shard:05d}-of-{shards:05d}.array_record' for shard in range(shards)]
  writers = [records.writer(os.path.join(folder, name)) for name in names]
  count, total = 0, _length(examples)
  for example in tqdm(_each(examples), desc=split, total=total, unit=' examples', file=sys.stderr):
    with decoding(lambda: place(examples, count), 'cannot be packed'):
      record = records.encode(example)
    writers[count % shards].write(record)
    count += 1
  for writer in writers:
    writer.close()
  return count


def _length(examples) -> int | None:
  return None if isinstance(examples, Stream) else len(examples)


def _each(examples) -> Iterable[Example]:
  # Iterating by index alone would never end: only the length of sources in memory ends them.
  return examples if isinstance(examples, Stream) else (examples[index] for index in range(len(examples)))


def main(arguments: Sequence[str] | None = None) -> None:
  """The command."""
  flags = command_line.Parser('moejax.data.pack', __doc__, keys='source')
  flags.add_argument('--to', metavar='FOLDER', help='folder to write')
  flags.add_argument('--shards', metavar='N', type=int, default=1, help='files per split; %(default)s by default')
  given = flags.parse(arguments, needs=['to'])
  config = config_files.override({}, given.overrides, 'source').to_dict()
  source = SOURCES.build(config, 'source')
  counts = pack(source, given.to, given.shards, config)
  classes = '' if source.num_classes is None else f', num_classes={source.num_classes}'
  print(f'{given.to}: {", ".join(f"{count} examples in {split}" for split, count in counts.items())}. '
        f"Train on it with config.data.source = dict(name='array_record', path={given.to!r}, "
        f'splits={tuple(counts)}{classes}).')


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
