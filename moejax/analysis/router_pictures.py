"""One small picture per paper: where its router sends twelve tokens ("A Review of Sparse Expert Models", figure 6).

    python -m moejax.analysis.router_pictures docs/routers.png
    python -m moejax.analysis.router_pictures docs/routers.pdf
    python -m moejax.analysis.router_pictures routers.svg
"""
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moejax import command_line
from moejax.analysis import style
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import SoftPlan

TOKENS, WIDTH, EXPERTS, IDS = 12, 8, 4, 11
CHOOSES = {
    'token': 'tokens choose experts', 'expert': 'experts choose tokens', 'together': 'assigned together',
    'soft': 'soft: all experts, or mixtures of tokens', 'fixed': 'known beforehand', 'chance': 'drawn',
}


def shares(name: str) -> np.ndarray:
  """<float32>[S,E]: weights of twelve tokens for four experts, in training, by the small router of a paper."""
  paper = papers.PAPERS[name]
  built = router.build(paper.fragment(**paper.example), f'papers.{name}', dim=WIDTH, num_experts=EXPERTS,
                       rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(3), 100))
  # At initialisation routers are nearly uniform; parameters of unit variance show typical decisions.
  graph, params, rest = nnx.split(built, nnx.Param, ...)
  params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) if leaf.ndim else leaf, params)
  x = jax.random.normal(jax.random.key(0), (1, TOKENS, WIDTH))
  plan = nnx.merge(graph, params, rest)(x, inputs(), key=jax.random.key(1), train=True).plan
  return np.asarray(plan.shares() if isinstance(plan, SoftPlan) else plan.to_dense().weight)[0]


def inputs() -> RouterInputs:
  """Two documents of six tokens each, of different tasks and modalities."""
  ids = jax.random.randint(jax.random.key(4), (1, TOKENS), 0, IDS)
  place = jnp.arange(TOKENS)[None]
  half = (place >= TOKENS // 2).astype(jnp.int32)
  return RouterInputs(
      token_ids=ids, previous_ids=jnp.roll(ids, 1, axis=1), next_ids=jnp.roll(ids, -1, axis=1),
      valid=jnp.ones(ids.shape, bool), positions=place % (TOKENS // 2), documents=half, tasks=half, modalities=half,
      shared=jax.random.normal(jax.random.key(5), (IDS, 5))[ids])


def figure() -> Figure:
  """All papers, sorted by who chooses whom."""
  names = sorted(papers.PAPERS, key=lambda name: (list(CHOOSES).index(papers.PAPERS[name].chooses), name))
  columns = 6
  rows = -(-len(names) // columns)
  figure = Figure(figsize=(2.1 * columns, 2.05 * rows + 0.8), layout='constrained')
  figure.suptitle('Twelve tokens (down) to four experts (across): combine weights over the largest', fontsize=13)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, name in zip(axes, names):
    weight = shares(name)
    axis.imshow(weight / max(weight.max(), 1e-9), cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axis.set(xticks=np.arange(EXPERTS + 1) - 0.5, yticks=np.arange(TOKENS + 1) - 0.5, xticklabels=[], yticklabels=[])
    axis.grid(linewidth=0.5)
    axis.tick_params(length=0)
    axis.set_title(name.replace('_', ' '), fontsize=10)
    axis.set_xlabel(CHOOSES[papers.PAPERS[name].chooses], fontsize=7.5, color=matplotlib.rcParams['xtick.color'])
  for axis in axes[len(names):]:
    axis.set_visible(False)
  return figure


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.analysis.router_pictures', __doc__, usage='path [flags]')
  flags.add_argument('path', help='picture to write')
  path = flags.parse().path
  with style.theme('light'):
    figure().savefig(path, dpi=110)
  print(f'{path}: {len(papers.PAPERS)} routers.')


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
