"""Faults that the tests must notice: each is one small wrong edit of the core, and the tests of its room."""
import dataclasses
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A wrong edit.

  Attributes:
    name: what is wrong then.
    path: of the file, from the root of the repository.
    right: text that stands there exactly once.
    wrong: what is put in its place.
    tests: the room's tests, as arguments of pytest: first the file that should notice, then the folder.
  """
  name: str
  path: str
  right: str
  wrong: str
  tests: str

  def planted(self, root: Path = ROOT) -> str:
    """The file with the fault. Raises ValueError where `right` does not stand there exactly once."""
    text = (root / self.path).read_text()
    if text.count(self.right) != 1:
      raise ValueError(f'{self.path} has {self.right!r} {text.count(self.right)} times, not once: the mutant '
                       f'{self.name!r} must be written anew.')
    return text.replace(self.right, self.wrong)


def _routing(name, file, right, wrong, test):
  return Mutant(name, f'moejax/routing/{file}.py', right, wrong, f'tests/routing/{test}.py tests/routing')


MUTANTS = (
    _routing('one slot too many', 'place/capacity', 'plan.kept & (slot < slots)', 'plan.kept & (slot <= slots)',
             'place/test_capacity'),
    _routing('the least important tokens go first', 'place/queues', 'jnp.argsort(-priority', 'jnp.argsort(priority',
             'place/test_capacity'),
    _routing('token order and choice order swapped', 'place/queues', "if order == 'choice' else (lambda array: array)",
             "if order == 'token' else (lambda array: array)", 'place/test_capacity'),
    _routing('capacity of evaluation while training', 'place/capacity', "if train or self.eval_capacity_factor is None",
             "if not train or self.eval_capacity_factor is None", 'place/test_capacity'),
    _routing('padding takes slots', 'place/queues', 'jnp.where(routed, expert, num_experts)', 'expert',
             'place/test_capacity'),
    _routing('a survivor of dropping is not renormalised', 'weigh/softmax', "if self.renormalize != 'after'",
             "if self.renormalize != 'before'", 'weigh/test_weightings'),
    _routing('softmax over tokens too', 'logits', 'range(2, logits.ndim)', 'range(1, logits.ndim)',
             'weigh/test_weightings'),
    _routing('balance loss detached from the router', 'balance/switch', 'token_mean(probs, valid), axis=-1)',
             'token_mean(jax.lax.stop_gradient(probs), valid), axis=-1)', 'balance/test_balancers'),
    _routing('GShard counts all choices', 'balance/switch', "if convention in ('gshard', 'fairseq') or",
             "if convention == 'fairseq' or", 'balance/test_balancers'),
    _routing('z-loss is not squared', 'balance/z', 'jax.nn.logsumexp(logits, axis=-1)**2, valid)',
             'jax.nn.logsumexp(logits, axis=-1), valid)', 'balance/test_balancers'),
    _routing('load loss at the first threshold', 'balance/load', 'top_k(logits, k)[..., -1:]',
             'top_k(logits, k)[..., :1]', 'balance/test_balancers'),
    _routing('the bias favours busy experts', 'balance/bias', 'jnp.sign(load.mean(-1, keepdims=True) - load)',
             'jnp.sign(load - load.mean(-1, keepdims=True))', 'balance/test_balancers'),
    _routing('a balance coefficient is dropped', 'router', 'self.balance[name].coefficient * loss', 'loss',
             'test_router'),
    _routing('noise while evaluating', 'score/linear', '    if not train:\n      return noiseless(clean)\n', '',
             'score/test_scores'),
    _routing('the random second expert is always taken', 'select/gshard_top_2', 'draw * threshold < second_gate',
             'draw * threshold >= 0', 'select/test_selections'),
    _routing('ties go to the last expert', 'select/top_k', 'num_experts, index).min(-1)', '-1, index).max(-1)',
             'select/test_selections'),
    Mutant('combine weights without gradient', 'moejax/dispatch/gather.py',
           'choice_of_slot, plan.kept_weight)', 'choice_of_slot, jax.lax.stop_gradient(plan.kept_weight))',
           'tests/dispatch/test_dispatch.py tests/dispatch'),
    Mutant('one-hot combine without weights', 'moejax/dispatch/einsum.py', 'expert * plan.kept_weight[..., None]', 'expert',
           'tests/dispatch/test_dispatch.py tests/dispatch'),
    Mutant('buffers come back along the wrong axis', 'moejax/dispatch/exchange.py',
           'split_axis=1, concat_axis=0, tiled=True', 'split_axis=0, concat_axis=1, tiled=True',
           'tests/dispatch/test_exchange.py tests/dispatch'),
    Mutant('experts of the first device everywhere', 'moejax/dispatch/exchange.py',
           "0 if self.inside else jax.lax.axis_index('expert') * self.count", '0',
           'tests/dispatch/test_exchange.py tests/dispatch'),
    Mutant('a block takes the next expert\'s row', 'moejax/kernels/xla.py', '(row < end)', '(row <= end)',
           'tests/kernels/test_cpu_implementations.py tests/kernels'),
    Mutant('the weight\'s gradient of the last block alone', 'moejax/kernels/xla.py', 'part if fresh else dw + part',
           'part', 'tests/kernels/test_cpu_implementations.py tests/kernels'),
    Mutant('the combine weight\'s gradient forgets the bias', 'moejax/kernels/xla.py',
           'dshare = dshare + (d * own.bo).sum(1)', 'pass', 'tests/kernels/test_cpu_implementations.py tests/kernels'),
    Mutant('attention sees the next token', 'moejax/layers/attend/inputs.py', 'seen.append(distance >= 0 if',
           'seen.append(distance >= -1 if', 'tests/layers/attend tests/layers tests/models'),
    Mutant('query heads share the wrong keys', 'moejax/layers/attend/plain.py',
           "'bsnrk,btnk->bnrst', grouped, keys", "'bsrnk,btnk->bnrst', grouped.swapaxes(2, 3)[:, :, ::-1], keys",
           'tests/layers/test_attention.py tests/layers'),
    Mutant('a window of attention is a token too wide', 'moejax/layers/attend/inputs.py',
           'jnp.abs(distance) < self.window', 'jnp.abs(distance) <= self.window',
           'tests/layers/attend/test_mask.py tests/layers'),
    Mutant('attention in blocks keeps the weights of an earlier largest logit', 'moejax/layers/attend/chunked.py',
           'before.values * faded[..., None] + added', 'before.values + added',
           'tests/layers/attend/test_attend.py tests/layers'),
    Mutant('attention in blocks has gradients as if weights did not sum to one', 'moejax/layers/attend/chunked.py',
           'weights * (dweights - _at(mean, i)[..., None])', 'weights * dweights',
           'tests/layers/attend/test_attend.py tests/layers'),
    Mutant('rotation in the other direction for half', 'moejax/layers/rotary.py',
           'second * cos + first * sin', 'second * cos - first * sin', 'tests/layers/test_rotary.py tests/layers'),
    Mutant('every layer has the first one\'s key', 'moejax/layers/stack.py', 'jax.random.fold_in(key, depth))(depths)',
           'jax.random.fold_in(key, 0 * depth))(depths)', 'tests/layers/test_stack.py tests/layers tests/models'),
    Mutant('the shared expert is forgotten', 'moejax/layers/feed_forwards/moe.py', 'y = y + shared', 'pass',
           'tests/layers/test_moe.py tests/layers'),
    Mutant('names do not separate keys', 'moejax/random.py', 'zlib.crc32(name.encode()) & 0x7FFFFFFF', '0',
           'tests/test_random.py tests/layers tests/routing'),
    Mutant('router losses are dropped', 'moejax/training/step.py', 'loss = weight * objective + router_loss',
           'loss = weight * objective', 'tests/training/test_step.py tests/training'),
    Mutant('every step draws the same randomness', 'moejax/training/step.py',
           'jax.random.fold_in(jax.random.key(setup.seed), state.step)', 'jax.random.key(setup.seed)',
           'tests/training/test_step.py tests/training'),
    Mutant('a refused batch is applied', 'moejax/training/step.py', 'jnp.where(accepted, new, old)', 'new',
           'tests/training/durability/test_rollback.py tests/training'),
    Mutant('weight decay on norms and biases', 'moejax/training/parameter_masks.py',
           'return len(named) >= 2 and not any(', 'return not any(',
           'tests/training/test_parameter_masks.py tests/training'),
    Mutant('the average follows at once', 'moejax/training/step.py', 'decay * a + (1 - decay) * p',
           '(1 - decay) * a + decay * p', 'tests/training/test_step.py tests/training'),
    Mutant('warm-up starts a step late', 'moejax/training/schedules.py', 'step < warmup, peak * step /',
           'step < warmup, peak * (step - 1) /', 'tests/training/test_schedules.py tests/training'),
    Mutant('padding counts in the loss', 'moejax/training/objectives.py', 'cross_entropy = _mean(entropy, mask)',
           'cross_entropy = _mean(entropy, jnp.ones_like(mask))', 'tests/training/test_objectives.py tests/training'),
    Mutant('every epoch in the same order', 'moejax/data/order.py', 'SeedSequence([seed % 2**64, epoch])',
           'SeedSequence([seed % 2**64, 0])', 'tests/data/test_data_order.py tests/data'),
    Mutant('targets are the tokens themselves', 'moejax/data/language_model.py',
           'joined(before, targets[:-1])', 'joined([], targets)',
           'tests/data/test_data_language_model.py tests/data'),
    Mutant('the data\'s position is not restored', 'moejax/training/durability/checkpoint.py',
           "iterator.set_state(about['data'])", 'pass',
           'tests/training/durability/test_checkpoint.py tests/training'),
    Mutant('gradients are not averaged over microbatches', 'moejax/training/step.py', '(x / count).astype(x.dtype)',
           'x.astype(x.dtype)', 'tests/training/test_step.py tests/training'),
)
