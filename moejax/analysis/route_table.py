"""The routes of a batch as a table: which expert each token went to, in which layer, with what weight.

    table = moejax.routes('runs/vmoe_digits')
    table.pandas().query('not kept').groupby('layer').size()
"""
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moejax.analysis.history import depth_order
from moejax.config import ConfigError, at
from moejax.evaluation import passes
from moejax.parallel import processes, rules
from moejax.routing.plans import Plan, SlotPlan, SoftPlan, TokenPlan, group_size
from moejax.routing.router import RouterOutput
from moejax.training import workdir as workdir_lib
from moejax.training.durability.restore import restore_for_evaluation
from moejax.training.setup import Setup, build

if TYPE_CHECKING:
  import pandas


@dataclasses.dataclass(frozen=True)
class RouteTable:
  """One row a route, as columns of one length: layer after layer, token by token (or slot by slot). Padding has none.

  What a row is depends on who chooses:

      tokens choose (TokenPlan)            a choice of a token, computed or not
      experts choose (SlotPlan)            a slot that is filled
      all experts see all tokens (DensePlan), or
      slots are mixtures (SoftPlan)        a token and an expert whose weight is above zero, summed over its slots

  Attributes:
    example: <int32> row of the batch.
    position: <int32> the token's place in that row: in a text the token, in an image the patch, row by row (with
      pool='token' the class token is 0), in a pair first the patches and then the words.
    token: <int32> id of the input token; -1 where there is none (patches, frames).
    layer: <str> as metrics name it: 'block_03', 'encoder_block_03'.
    choice: <int32> 0 for the token's first choice; where experts choose, the number of the slot; else 0 for the largest
      of the token's weights.
    expert: <int32>.
    weight: <float32> of the expert in the token's output; 0 where not kept.
    kept: <bool> whether the expert computes the token.
    probability: <float32> that the router gives the expert (`RouterOutput.probs`), before any choice.
  """
  example: np.ndarray
  position: np.ndarray
  token: np.ndarray
  layer: np.ndarray
  choice: np.ndarray
  expert: np.ndarray
  weight: np.ndarray
  kept: np.ndarray
  probability: np.ndarray

  def __len__(self) -> int:
    return len(self.expert)

  def pandas(self) -> 'pandas.DataFrame':
    """The columns by name, `layer` as a category. Raises ImportError where pandas is missing."""
    try:
      import pandas
    except ImportError as error:
      raise ImportError("Route tables as data frames need pandas: pip install 'moejax[data]', or use the columns, "
                        'which are numpy arrays.') from error
    columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return pandas.DataFrame(columns).astype({'layer': 'category'})


def routes(workdir: str | Path, batch: Mapping[str, np.ndarray] | str | None = None, step: int | None = None,
           train: bool = False) -> RouteTable:
  """Where the routers of a run send the tokens of a batch.

  Args:
    workdir: of a run that has a checkpoint.
    batch: arrays as the run's pipeline makes them, or the name of a split, whose first batch is taken; None: 'test'.
      Where tokens compete for slots, it matters what else is in the batch: groups are those of `config.model.moe.group`.
    step: of the checkpoint; None: the last that can be read.
    train: whether routers decide as in training (its capacity, and noise of one fixed key), not as at evaluation.

  Raises:
    ConfigError: a split or an array that does not exist, rows that do not divide over the devices, or a dense model.
    NoCheckpoint: there is none.
  """
  workdir = workdir_lib.find(workdir)
  config, _, params, router_state = restore_for_evaluation(workdir, step)
  setup = build(config)
  params = processes.spread(params, rules.shardings(setup.mesh, setup.model.axes, params))
  router_state = processes.spread(router_state, rules.shardings(setup.mesh, setup.model.state_axes, router_state))
  if batch is None or isinstance(batch, str):
    with at('batch'):
      split = passes.Split(setup.pipeline, setup.mesh, batch or 'test', setup.microbatch)
    batch = next(iter(split.host_batches(whole=True)))
  return of_batch(setup, params, router_state, batch, train)


def of_batch(setup: Setup, params, router_state, batch: Mapping[str, np.ndarray], train: bool = False) -> RouteTable:
  """`routes` of a model that is in memory; `batch` whole in every process."""
  batch = {name: np.asarray(values) for name, values in batch.items()}
  size, shards = len(next(iter(batch.values()), ())), rules.batch_shards(setup.mesh)
  if size % shards:
    raise ConfigError(f'batch: {size} examples do not divide over {shards} shards of the batch. Give a multiple of '
                      'that, or fewer devices.')

  def run(params, router_state, batch):
    key = jax.random.key(0) if train else None
    routers = setup.model.apply(params, router_state, batch, key=key, train=train).routers
    return {layer: (router.plan, _probabilities(router)) for layer, router in routers.items()}

  program = passes.MeshProgram(run, setup.mesh)
  try:
    program.trace(params, router_state, batch)
  except KeyError as missing:
    raise ConfigError(f'batch: the model reads {missing}, and the batch has {", ".join(batch)}. Batches of '
                      f'config.data have {", ".join(setup.pipeline.batch_spec())}.') from None
  here = processes.local_rows(setup.mesh, size)
  decided = jax.device_get(program(params, router_state, setup.place({name: x[here] for name, x in batch.items()})))
  if not decided:
    raise ConfigError('The model has no sparse layers, and so no routes: config.model.sparse.name is '
                      f'{setup.config.model.get("sparse", {}).get("name")!r}.')
  return join(_layer(layer, plan, probability, batch, size)
              for layer, (plan, probability) in sorted(decided.items(), key=lambda item: depth_order(item[0])))


def join(tables: Iterable[RouteTable]) -> RouteTable:
  """The rows of one after those of the other."""
  tables = list(tables)
  return RouteTable(**{field.name: np.concatenate([getattr(table, field.name) for table in tables])
                       for field in dataclasses.fields(RouteTable)})


def _probabilities(router: RouterOutput) -> jax.Array:
  # For each entry of the plan, so that nothing of size E leaves the devices where tokens choose a few experts.
  assert router.probs is not None  # which only mixtures of whole layers lack, and they have no plan
  return router.probs if isinstance(router.plan, SoftPlan) else router.plan.pick(router.probs)


def _layer(layer: str, plan: Plan, probability: np.ndarray, batch: dict[str, np.ndarray], size: int) -> RouteTable:
  group, token, choice, expert, weight, kept, probability = _entries(plan, probability)
  length = len(jax.tree.leaves(plan)[0]) * group_size(plan) // size
  # Groups are a row-major reshape of the batch.
  example, position = np.divmod(group * group_size(plan) + token, length)
  ids, valid = _tokens(batch, layer, (size, length))
  rows = valid[example, position]
  int32 = lambda column: column[rows].astype(np.int32)
  return RouteTable(
      example=int32(example), position=int32(position), token=int32(ids[example, position]),
      layer=np.full(rows.sum(), layer), choice=int32(choice), expert=int32(expert),
      weight=np.where(kept, weight, 0)[rows].astype(np.float32), kept=kept[rows],
      probability=probability[rows].astype(np.float32))


def _entries(plan: Any, probability: Any) -> tuple[Any, ...]:
  """(group, token, choice, expert, weight, kept, probability) of every route, each <..>[N]."""
  if isinstance(plan, TokenPlan):
    group, token, choice = np.indices(plan.expert.shape)
    columns = (group, token, choice, plan.expert, plan.weight, plan.kept, probability)
    return tuple(column.ravel() for column in columns)
  if isinstance(plan, SlotPlan):
    group, expert, slot = np.indices(plan.token.shape)
    columns = (group, plan.token, slot, expert, plan.weight, plan.filled, probability)
    return tuple(column[plan.filled] for column in columns)
  weight: Any = plan.combine.sum(-1) if isinstance(plan, SoftPlan) else plan.weight
  expert: Any = np.argsort(-weight, axis=-1, kind='stable')
  weight = np.take_along_axis(weight, expert, axis=-1)
  probability = np.take_along_axis(probability, expert, axis=-1)
  group, token, choice = np.indices(weight.shape)
  return tuple(column[weight > 0] for column in (group, token, choice, expert, weight, weight > 0, probability))


def _tokens(batch: dict[str, np.ndarray], layer: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """(<int>[B,S] ids of the tokens, -1 where there are none; <bool>[B,S] what is not padding) of a layer."""
  ids, valid = np.full(shape, -1), np.ones(shape, bool)
  stack = next((name for name in ('encoder_', 'decoder_') if layer.startswith(name)), '')
  # In a pair the words follow the patches: what has an id, or says whether it is padding, is last.
  for name, values in ((f'{stack}tokens', ids), (f'{stack}segments', valid)):
    if name in batch:
      values[:, -batch[name].shape[1]:] = batch[name] if values is ids else batch[name] > 0
  if 'valid' in batch:
    valid &= batch['valid'].astype(bool)[:, None]
  return ids, valid
