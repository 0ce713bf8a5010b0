"""Where tokens go: runs the model on evaluation batches and collects the routing decisions as numpy arrays."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moejax.analysis.history import depth_order
from moejax.evaluation import passes
from moejax.functional import Functional, Tree
from moejax.routing.plans import DensePlan, Plan, SoftPlan, TokenPlan


@dataclasses.dataclass(frozen=True)
class LayerRoutes:
  """The routing of one layer, over N examples of S tokens.

  Attributes:
    weight: <float32>[N,S,E] share of each expert in the output of each token; 0 if not computed.
    read: <float32>[N,S,E] share of each token in each expert's input, summed over slots; None unless soft.
    load: <float64>[E] share of routing choices that select each expert; sums to 1.
    metrics: `{name: value}`: means over valid tokens of the router's scalar metrics (dropped, confidence, entropy and
      losses before their coefficients).
    experts_per_token: rows of expert computation per token.
  """
  weight: np.ndarray
  read: np.ndarray | None
  load: np.ndarray
  metrics: dict[str, float]
  experts_per_token: float

  @property
  def num_experts(self) -> int:
    """E."""
    return self.weight.shape[-1]

  @property
  def first(self) -> np.ndarray:
    """<int>[N,S]: the expert with the largest weight; -1 if no expert computes the token."""
    return np.where(self.weight.max(-1) > 0, self.weight.argmax(-1), -1)


@dataclasses.dataclass(frozen=True)
class BatchRoutes:
  """Attributes:
    layers: `{depth name: LayerRoutes}`, first to last; empty for a dense model.
    batch: the examples, [N,...] by batch key; without padding examples (but with the padding tokens of texts).
  """
  layers: dict[str, LayerRoutes]
  batch: dict[str, np.ndarray]

  def valid(self, layer: str) -> np.ndarray:
    """<bool>[N,S]: False for padding among the tokens of a layer."""
    valid = np.asarray(passes.valid_tokens(self.batch, layer))
    return np.broadcast_to(valid if valid.ndim == 2 else valid[:, None], self.layers[layer].weight.shape[:2])


def collect(model: Functional, params: Tree, router_state: Tree, split: passes.Split, mesh: jax.sharding.Mesh,
            max_tokens: int = 32768) -> BatchRoutes:
  """Runs `model` on batches of `split` until every layer has seen `max_tokens` tokens, or the split ends."""
  def run(params, router_state, batch):
    routers = model.apply(params, router_state, batch).routers
    size = next(iter(batch.values())).shape[0]
    return {name: _per_example(router.plan, size) | {'metrics': router.metrics} for name, router in routers.items()}

  compiled = passes.MeshProgram(run, mesh)
  parts, batches, seen = [], [], 0
  for batch in split:
    parts.append(jax.device_get(compiled(params, router_state, batch)))
    batches.append({name: _fetch(x) for name, x in batch.items()})
    seen += max([part['weight'][..., 0].size for part in parts[-1].values()], default=split.batch_size)
    if seen >= max_tokens:
      break
  plans = experts_per_token(model, split.spec)
  keep = np.concatenate([_real_examples(batch) for batch in batches])
  layers = {name: _join(name, parts, batches, keep, plans[name]) for name in sorted(parts[0], key=depth_order)}
  return BatchRoutes(layers, {name: np.concatenate([b[name] for b in batches])[keep] for name in batches[0]})


def experts_per_token(model: Functional, spec: dict[str, jax.ShapeDtypeStruct]) -> dict[str, float]:
  """`{layer: rows of expert computation per token}`, from shapes alone; nothing is run."""
  params, state = model.shapes()
  routers = jax.eval_shape(lambda p, s, b: model.apply(p, s, b).routers, params, state, spec)
  return {name: rows_per_token(router.plan) for name, router in routers.items()}


def rows_per_token(plan: Plan) -> float:
  """K, E (dense), or slots per token of plans with slots, which are computed even if empty."""
  if isinstance(plan, TokenPlan):
    return float(plan.expert.shape[-1])
  if isinstance(plan, DensePlan):
    return float(plan.num_experts)
  if isinstance(plan, SoftPlan):
    _, tokens, experts, slots = plan.dispatch.shape
    return experts * slots / tokens
  return plan.num_experts * plan.capacity / plan.num_tokens


def _per_example(plan, batch):
  if isinstance(plan, SoftPlan):
    weight, read = plan.combine.sum(-1), plan.dispatch.sum(-1)
  else:
    weight, read = (plan if isinstance(plan, DensePlan) else plan.to_dense()).weight, None
  # Groups are a row-major reshape of the batch.
  reshape = lambda x: x.astype(jnp.float32).reshape(batch, -1, x.shape[-1])
  return {'weight': reshape(weight), **({} if read is None else {'read': reshape(read)})}


def _join(name, parts, batches, keep, rows):
  tokens = np.array([passes.valid_tokens(batch, name).sum() for batch in batches], np.float64)
  share = tokens / max(tokens.sum(), 1)
  def mean(metric):
    # A batch of only padding has weight 0, whatever its metrics.
    return np.asarray(sum(w * np.asarray(part[name]['metrics'][metric], np.float64) for w, part in zip(share, parts) if w))
  def examples(field):
    return np.concatenate([part[name][field] for part in parts])[keep]
  metrics = parts[0][name]['metrics']
  return LayerRoutes(weight=examples('weight'), read=examples('read') if 'read' in parts[0][name] else None,
                     load=mean('load'), experts_per_token=rows,
                     metrics={metric: float(mean(metric)) for metric in metrics if np.ndim(metrics[metric]) == 0})


def _real_examples(batch):
  for name in ('valid', 'segments', 'decoder_segments'):
    if name in batch:
      return batch[name].reshape(len(batch[name]), -1).any(-1)
  raise ValueError(f'the batch has no key that marks padding, only {sorted(batch)}.')


def _fetch(x):
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
