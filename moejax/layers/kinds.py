"""From the keys of a transformer to the kind of each of its layers, and the branches of each kind."""
import dataclasses
from collections.abc import Mapping
from typing import Literal

from moejax.config import ConfigError, config_path
from moejax.layers.block import BranchSpec
from moejax.layers.pattern import Kind, dense_or_sparse, mixtures, named_kinds
from moejax.layers.stack import Depth, Remat, Stacking
from moejax.ranges import Rate

# The mixture of a sparse block replaces the dense feed-forward, is inserted after it, or replaces the whole block, with
# blocks as experts (`block_mixture`).
SparseForm = Literal['replace', 'insert', 'layer']

# Parameters shared by all layers. 'all': one block, used at every depth (ALBERT, 1909.11942); 'all_but_norms': one
# attention, one router and one set of experts, but each layer has its own norms, so a token may be routed to different
# experts at different depths (WideNet, 2107.11817).
Sharing = Literal['none', 'all', 'all_but_norms']


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The keys of a `Transformer`, which its model's config holds.

  Attributes:
    num_layers: L.
    norm: for every branch and at the end; see `norms`.
    attention: for every block; see `Attention`. Needed without `blocks`, as is `feed_forward`.
    feed_forward: for dense blocks; see `FeedForward`.
    moe: for sparse blocks; see `MoE`. May be None if no layer is sparse. Its `num_experts` may be a list with one int
      for each sparse layer.
    sparse: which layers are sparse; see `pattern`. None: no layer.
    extra_feed_forward: one more dense branch after each mixture of experts (ST-MoE), or None.
    sparse_form: a mixture of experts replaces the feed-forward of its block, is inserted after it (BASE layers), or
      mixes whole layers (`LayerMixture`).
    blocks: kinds of blocks by name, each with its branches by name, in order, in place of the keys above; see `pattern`.
    pattern: the kind of each layer; may be None if there is only one.
    view: what blocks compute with in place of their stored weights, e.g. LoRA; see `views`.
    dropout: on every branch, and on the input.
    stochastic_depth: drop rate of the branches of the last block; linear in depth from 0 at the first.
    stacking: scanned (only distinct blocks are compiled) or unrolled.
    remat: the residuals of each block saved for the backward pass.
    sharing: the parameters shared by all layers; see `Sharing`. The state of a shared router is updated once per step,
      from the tokens of all layers.
  """
  num_layers: Depth
  norm: Mapping
  attention: Mapping | None = None
  feed_forward: Mapping | None = None
  moe: Mapping | None = None
  sparse: Mapping | None = None
  extra_feed_forward: Mapping | None = None
  sparse_form: SparseForm = 'replace'
  blocks: Mapping | None = None
  pattern: Mapping | None = None
  view: Mapping | None = None
  dropout: Rate = 0.
  stochastic_depth: Rate = 0.
  stacking: Stacking = 'unrolled'
  remat: Remat = 'none'
  sharing: Sharing = 'none'


def expand(config: TransformerConfig, cross_attention: bool = False) -> tuple[tuple[str, ...], dict[str, Kind]]:
  """The kind of each layer, and the branches of each kind."""
  if config.blocks is None:
    return _dense_and_sparse(config, cross_attention)
  shorthand = [name for name in ('attention', 'feed_forward', 'moe', 'extra_feed_forward')
               if getattr(config, name) is not None]
  if shorthand:
    raise ConfigError(f'.{shorthand[0]}: {config_path()}.blocks says what each kind of block is made of. Remove '
                      f'{", ".join(shorthand)}.')
  return named_kinds(config.blocks, config.pattern, config.num_layers)


def _dense_and_sparse(config: TransformerConfig, cross_attention: bool) -> tuple[tuple[str, ...], dict[str, Kind]]:
  """The shorthand: attention (then cross-attention), then a feed-forward or a mixture of experts."""
  if config.attention is None or config.feed_forward is None:
    missing = 'attention' if config.attention is None else 'feed_forward'
    raise ConfigError(f'.{missing} is missing: a Transformer needs attention and feed_forward, or blocks.')
  kinds, sparse = mixtures(
      config.moe, dense_or_sparse(config.sparse or dict(name='none'), config.num_layers))
  if config.moe is None and 'sparse' in kinds:
    raise ConfigError(f'.moe is missing: {config_path()}.sparse makes some layers sparse. Set moe, or sparse=none.')
  if config.sparse_form == 'layer' and (config.sharing == 'all_but_norms' or config.extra_feed_forward is not None):
    key, why = (('sharing', "each expert is a layer with its own norms. Use 'all' or 'none'")
                if config.extra_feed_forward is None else
                ('extra_feed_forward', 'there is no mixture branch to add it after. Remove it'))
    raise ConfigError(f".{key}: with sparse_form='layer' {why}.")

  def branch(key: str, name: str, keys: Mapping, norm: str = '') -> BranchSpec:
    return BranchSpec({'name': name, **keys}, f'{config_path()}.{key}', norm)

  mixed = dict(attention=branch('attention', 'attention', config.attention))
  if cross_attention:
    mixed['cross_attention'] = BranchSpec({**config.attention, 'name': 'cross_attention'}, f'{config_path()}.attention')
  dense = dict(feed_forward=branch('feed_forward', 'feed_forward', config.feed_forward))
  contents = {'dense': {**mixed, **dense}}
  for kind, moe in sparse.items():
    if config.sparse_form == 'insert':  # without a norm: experts have their own
      contents[kind] = {**mixed, **dense, 'moe': branch('moe', 'moe', {'pre_norm': None, **moe})}
    else:  # takes the norm of the feed-forward that it replaces, so that a dense model's parameters fit it
      contents[kind] = {**mixed, 'moe': branch('moe', 'moe', moe, norm='feed_forward_norm')}
    if config.extra_feed_forward is not None:
      contents[kind]['extra_feed_forward'] = branch('extra_feed_forward', 'feed_forward', config.extra_feed_forward,
                                                    norm='extra_norm')
  return kinds, contents
