"""Connectionist temporal classification: frames to labels without an alignment (Graves et al. 2006).

A path assigns a label, or the blank 0, to every frame; it spells the labels left after merging repetitions and then
removing blanks. Axes: B utterances, S frames, N target labels, V vocabulary including the blank.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped
import optax

BLANK = 0


def arguments(batch: dict[str, Shaped[Array, '...']]) -> dict[str, Shaped[Array, '...']]:
  """The arguments of the functions below, from a batch of speech."""
  return dict(frames=batch['segments'] > 0, targets=batch['targets'], counted=batch['loss_mask'] > 0)


def loss(logits: Float[Array, 'B S V'], frames: Bool[Array, 'B S'], targets: Int[Array, 'B N'],
         counted: Bool[Array, 'B N']) -> Float32[Array, 'B']:
  """Minus the log of the total probability of the paths that spell the targets; 0 if there are no such paths.

  Args:
    logits: <float>[B,S,V].
    frames: <bool>[B,S], True entries first.
    targets: <int32>[B,N], none of them the blank.
    counted: <bool>[B,N], True entries first.

  Returns:
    <float32>[B].
  """
  losses = optax.ctc_loss(logits.astype(jnp.float32), 1. - frames, targets, 1. - counted, blank_id=BLANK)
  return jnp.where(alignable(frames, targets, counted), losses, 0)


def alignable(frames: Bool[Array, 'B S'], targets: Int[Array, 'B N'], counted: Bool[Array, 'B N']) -> Bool[Array, 'B']:
  """<bool>[B]: whether there are enough frames for labels and the blanks between equal ones. Arguments as in `loss`."""
  repeated = (targets[:, 1:] == targets[:, :-1]) & counted[:, 1:]
  return frames.sum(-1) >= counted.sum(-1) + repeated.sum(-1)


def greedy(logits: Float[Array, 'B S V'], frames: Bool[Array, 'B S']) -> tuple[Int[Array, 'B S'], Bool[Array, 'B S']]:
  """Decodes the most probable path.

  Args:
    logits: <float>[B,S,V].
    frames: <bool>[B,S].

  Returns:
    <int32>[B,S] the label of each frame, and <bool>[B,S] whether it is spelt: not a blank, padding or repetition.
  """
  labels = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  before = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=BLANK)[:, :-1]
  return labels, frames & (labels != BLANK) & (labels != before)


def edit_distance(labels: Int[Array, 'B S'], spelt: Bool[Array, 'B S'], targets: Int[Array, 'B N'],
                  counted: Bool[Array, 'B N']) -> Int[Array, 'B']:
  """Minimum number of insertions, deletions and substitutions between spelt labels and targets (Levenshtein 1966).

  Args:
    labels, spelt: <int32>[B,S], <bool>[B,S]; labels not spelt are skipped.
    targets, counted: <int32>[B,N], <bool>[B,N], True entries first.

  Returns:
    <int32>[B].
  """
  places = jnp.arange(targets.shape[1] + 1)

  def step(row, label_and_spelt):
    # row[b, n]: the distance of the labels spelt so far to the first n targets.
    label, spelt = label_and_spelt
    changed = row[:, :-1] + (label[:, None] != targets)
    below = jnp.concatenate([row[:, :1] + 1, jnp.minimum(row[:, 1:] + 1, changed)], axis=1)
    # Insertions, min over m <= n of below[m] + (n - m), are a running minimum.
    inserted = places + jax.lax.cummin(below - places, axis=1)
    return jnp.where(spelt[:, None], inserted, row), None

  row, _ = jax.lax.scan(step, jnp.broadcast_to(places, (len(targets), len(places))), (labels.T, spelt.T))
  return jnp.take_along_axis(row, counted.sum(-1, keepdims=True), axis=1)[:, 0]
