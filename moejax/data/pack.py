"""Packs any source into ArrayRecord files, which are read by index, in any order, from any disk.

    python -m moejax.data.pack --to=digits --source.name=digits
    python -m moejax.data.pack --to=packed --shards=64 --source.name=jsonl --source.files='{"train": "web/*.jsonl"}'

Keys of `--source.` are those of `config.data.source`; values are Python literals, or else strings.
"""
import argparse
import ast
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from moejax.config import ConfigError
from moejax.data import SOURCES, records
from moejax.data.source import DataError, Example, Source, Stream


def pack(source: Source, folder: str, shards: int = 1, config: Mapping | None = None) -> dict[str, int]:
  """Writes all splits of `source` into `folder`, and `info.json` last; returns the number of examples by split."""
  if os.path.exists(os.path.join(folder, records.INFO)):
    raise DataError(f'{folder} holds packed data already. Choose another folder, or delete it.')
  os.makedirs(folder, exist_ok=True)
  counts = {split: _write(source.open(split), folder, split, shards) for split in source.splits}
  info = {'examples': counts, 'num_classes': source.num_classes, 'source': dict(config or {})}
  with open(os.path.join(folder, records.INFO), 'w', encoding='utf-8') as file:
    json.dump(info, file, indent=2)
  return counts


def _write(examples, folder: str, split: str, shards: int) -> int:
  names = [f'{split}-{shard:05d}-of-{shards:05d}.array_record' for shard in range(shards)]
  writers = [records.writer(os.path.join(folder, name)) for name in names]
  count = 0
  total = None if isinstance(examples, Stream) else len(examples)
  for example in tqdm(_each(examples), desc=split, total=total, unit=' examples', file=sys.stderr):
    writers[count % shards].write(records.encode(example))
    count += 1
  for writer in writers:
    writer.close()
  return count


def _each(examples) -> Iterable[Example]:
  # Iterating by index would go on forever: sources in memory have no end but their length.
  return examples if isinstance(examples, Stream) else (examples[index] for index in range(len(examples)))


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict]:
  """Known options, and the source's config from `--source.key=value`."""
  parser = argparse.ArgumentParser(prog='python -m moejax.data.pack', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--to', required=True, help='folder to write')
  parser.add_argument('--shards', type=int, default=1, help='files a split')
  options, rest = parser.parse_known_args(arguments)
  config = {}
  for argument in rest:
    key, equals, value = argument.removeprefix('--source.').partition('=')
    if not argument.startswith('--source.') or not equals:
      parser.error(f'{argument} is neither --to, --shards nor of the form --source.key=value.')
    try:
      config[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      config[key] = value
  return options, config


def main(arguments: Sequence[str]) -> int:
  """The command; returns its exit code."""
  options, config = parse(arguments)
  try:
    source = SOURCES.build(config, 'source')
    counts = pack(source, options.to, options.shards, config)
  except (ConfigError, DataError, ImportError) as error:
    print(error, file=sys.stderr)
    return 1
  classes = '' if source.num_classes is None else f', num_classes={source.num_classes}'
  print(f'{options.to}: {", ".join(f"{count} examples in {split}" for split, count in counts.items())}. '
        f"Train on it with config.data.source = dict(name='array_record', path={options.to!r}, "
        f'splits={tuple(counts)}{classes}).')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
