"""How the parameters of a new run start: drawn, or from the checkpoints of other runs by rules (config.init).

    init=dict(name='checkpoint', path='runs/vit_digits', rules=(
        dict(ours='/moe/experts/', source='/feed_forward/', do='repeat'), dict(ours='/moe/router/', do='reinitialise')))

Only a run without a checkpoint of its own reads a source, once; lineage.json in its folder says what it read. The
optimizer's state and the moving average start anew. Router state has paths like parameters, and follows the same rules.
"""
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from moejax import buckets
from moejax.checkpoints import mapping
from moejax.checkpoints.mapping import Assigned, MappingRule
from moejax.checkpoints.operations import REINITIALISE, Shape
from moejax.checkpoints.unrolled import Stored, stored
from moejax.config import ConfigError, Registry, at, call, config_path
from moejax.functional import flatten
from moejax.parallel import processes
from moejax.ranges import Natural
from moejax.training import step as step_lib
from moejax.training import workdir
from moejax.training.durability.restore import find_step, restore_for_evaluation
from moejax.training.durability.stop_reasons import NoCheckpoint

FILE = 'lineage.json'


class Init:
  """Base class of the ways in which parameters start."""

  def check(self, setup) -> None:
    """Raises ConfigError, before anything is allocated or written, if the parameters of `setup` cannot start so."""

  def state(self, setup, folder: Path, say: Callable[[str], None]) -> step_lib.TrainState:
    """The initial state of the run in `folder`."""
    raise NotImplementedError


INITS: Registry[Init] = Registry('start of the parameters', Init)


@INITS('random')
class RandomInit(Init):
  """All parameters are drawn, as their modules say, from config.seed."""

  def __init__(self):
    pass

  def state(self, setup, folder, say):
    return step_lib.init_state(setup)


class SourceRun(NamedTuple):
  """A checkpoint of another run.

  Attributes:
    path: of its run.
    step: of the checkpoint.
    arrays: parameters and router state by path in the unrolled form: numpy arrays, or their shapes alone.
    lineage: of its run; None for one that was drawn.
  """
  path: str
  step: int
  arrays: dict[str, Any]
  lineage: dict | None

  def __str__(self):
    return f'{self.path}, step {self.step}'


@INITS('checkpoint')
class CheckpointInit(Init):
  """Parameters and router state come from checkpoints of other runs, by rules; see `checkpoints.mapping`.

  Where the source keeps a moving average, that is read: it is what the source evaluates.

  Config:
    path: the workdir of a run, or one of its checkpoints (runs/x/checkpoints/800); or several, for the rules 'stack' and
      'mean' (Branch-Train-MiX, 2403.07816).
    step: of the checkpoint: an int, the 'last', or the 'best' by the source's config.checkpoint.metric.
    rules: what each array of ours starts from, see `MappingRule`; the first that matches counts. An array without one is
      copied from the same path. A rule that matches nothing is refused.
    unused: regular expressions, searched in paths of the source: arrays that may stay unused.
  """

  def __init__(self, *, path: str | tuple[str, ...], step: Natural | Literal['last', 'best'] = 'last',
               rules: tuple[Mapping, ...] = (), unused: tuple[str, ...] = ()):
    self.paths = (path,) if isinstance(path, str) else tuple(path)
    if not self.paths:
      raise ConfigError('.path is empty: name the workdir of a run.')
    self.step, self.unused, self.where = step, tuple(unused), config_path()
    self.rules = [call(MappingRule, rule, f'.rules[{number}]') for number, rule in enumerate(rules)]
    for number, pattern in enumerate(self.unused):
      try:
        re.compile(pattern)
      except re.error as error:
        raise ConfigError(f'.unused[{number}] = {pattern!r} is not a regular expression ({error}).') from None

  def check(self, setup):
    self._assign(_Ours(setup), self._read(arrays=False))

  def state(self, setup, folder, say):
    given, lineage = self.read(setup)
    say(sentence(lineage))
    if jax.process_index() == 0:
      workdir.write_atomically(folder / FILE, json.dumps(lineage, indent=2) + '\n')
    return step_lib.init_state(setup, given)

  def read(self, setup) -> tuple[dict[str, step_lib.Given], dict]:
    """({path: what is not drawn}, lineage): reads the sources."""
    ours, sources = _Ours(setup), self._read(arrays=True)
    assigned = self._assign(ours, sources)
    given = {path: ours.given(path, assigned, sources) for path in ours.shapes}
    return ({path: value for path, value in given.items() if value is not None}, self._lineage(assigned, sources))

  def _read(self, arrays: bool) -> list[SourceRun]:
    with processes.together(f'read {self.where}.path'), at(self.where):
      return [_source(path, self.step, arrays) for path in self.paths]

  def _assign(self, ours: '_Ours', sources: list[SourceRun]) -> dict[str, Assigned]:
    with at(self.where):
      shapes = [{path: tuple(leaf.shape) for path, leaf in source.arrays.items()} for source in sources]
      return mapping.assign(self.rules, self.unused, ours.unrolled_shapes(), shapes, ' and '.join(map(str, sources)))

  def _lineage(self, assigned: Mapping[str, Assigned], sources: list[SourceRun]) -> dict:
    read = {one.source for one in assigned.values() if one.do != REINITIALISE}
    by_rule = Counter(one.rule for one in assigned.values())
    return dict(
        sources=[dict(path=source.path, step=source.step, crc32=_checksum(source.arrays), lineage=source.lineage,
                      unused=sorted(source.arrays.keys() - read)) for source in sources],
        rules=[dict(ours=rule.ours, do=rule.do, source=rule.source, arrays=by_rule[number])
               for number, rule in enumerate(self.rules)],
        without_rule=by_rule[None],
        counts=mapping.counts(assigned.values()))


class _Ours:
  """The parameters and the router state of a run: shapes and shardings, and how they are stored."""

  def __init__(self, setup):
    self.shapes = {path: leaf for tree in setup.model.shapes() for path, leaf in flatten(tree).items()}
    shardings = step_lib.state_shardings(setup)
    self._shardings = {**flatten(shardings.params), **flatten(shardings.router_state)}
    self._layers: dict[str, dict[str, Stored]] = {path: {} for path in self.shapes}
    for path, place in stored(self.shapes).items():
      self._layers[place.path][path] = place

  def unrolled_shapes(self) -> dict[str, Shape]:
    """{path in the unrolled form: shape}."""
    return {path: self._shape(place) for layers in self._layers.values() for path, place in layers.items()}

  def given(self, path: str, assigned: Mapping[str, Assigned], sources: list[SourceRun]) -> step_lib.Given | None:
    """The value of the stored parameter at `path`, on the mesh; None if all of it is drawn."""
    layers = {name: place for name, place in self._layers[path].items() if assigned[name].do != REINITIALISE}
    if not layers:
      return None
    dtype, arrays = self.shapes[path].dtype, [source.arrays for source in sources]
    values = [np.asarray(assigned[name].value(arrays, self._shape(place)), dtype) for name, place in layers.items()]
    scanned = next(iter(layers.values())).repeat is not None
    whole = {path: np.stack(values) if scanned else values[0]}
    array = processes.spread(whole, {path: self._shardings[path]})[path]
    partial = scanned and len(layers) < len(self._layers[path])
    return step_lib.Given(array, np.array([place.repeat for place in layers.values()], np.int32) if partial else None)

  def _shape(self, place: Stored) -> Shape:
    shape = tuple(self.shapes[place.path].shape)
    return shape if place.repeat is None else shape[1:]


def sentence(lineage: Mapping) -> str:
  """'Parameters start from runs/vit_digits, step 800: 24 copied, 8 repeated to experts, 2 reinitialised.'"""
  named = ' and '.join(f'{source["path"]}, step {source["step"]}' for source in lineage['sources'])
  return f'Parameters start from {named}: {lineage["counts"]}.'


def lineage(folder: str | Path) -> dict | None:
  """What lineage.json of a run holds; None for a run whose parameters were drawn."""
  file = buckets.path(folder) / FILE
  return json.loads(file.read_text()) if file.exists() else None


def _source(name: str, step: int | str, arrays: bool) -> SourceRun:
  folder = buckets.path(os.path.expanduser(name))
  if folder.parent.name == 'checkpoints' and folder.name.isdigit():
    if step not in ('last', int(folder.name)):
      raise ConfigError(f'.step = {step!r}, but {config_path()}.path is the checkpoint of step {folder.name}. Remove one.')
    folder, step = folder.parent.parent, int(folder.name)
  try:
    _, number, *trees = restore_for_evaluation(folder, find_step(folder, step), arrays)
  except NoCheckpoint as error:
    raise ConfigError(f'.path: {error}') from error
  flat = {path: leaf for tree in trees for path, leaf in flatten(tree).items()}

  def entry(place):
    leaf = flat[place.path]
    if place.repeat is None:
      return leaf
    return leaf[place.repeat] if arrays else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

  return SourceRun(str(folder), number, {path: entry(place) for path, place in stored(flat).items()}, lineage(folder))


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
  """CRC-32 of all values, in the order of their paths."""
  checksum = 0
  for _, value in sorted(arrays.items()):
    checksum = zlib.crc32(value.tobytes(), checksum)
  return checksum
