"""Features of a token's sentence and task, against loops."""
from flax import nnx
import numpy as np
import pytest

from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES
from tasks_and_documents import D, DOCUMENTS, E, G, INPUTS, S, TASKS, VALID, X


def feature(**config):
  return FEATURES.build(config, 'config.features', dim=D, rngs=nnx.Rngs(0))


def test_the_mean_of_a_sentence_equals_a_loop_over_its_tokens():
  means = feature(name='sentence')(X, INPUTS)
  x, documents, valid = np.asarray(X, np.float64), np.asarray(DOCUMENTS), np.asarray(VALID)
  for g, s in zip(*np.nonzero(valid)):
    tokens = [x[g, other] for other in range(S) if documents[g, other] == documents[g, s] and valid[g, other]]
    np.testing.assert_allclose(means[g, s], sum(tokens) / len(tokens), rtol=1e-5, atol=1e-6)  # float32 sums


def test_all_tokens_of_a_task_have_its_vector_and_unknown_tasks_have_none():
  one = feature(name='task', num_tasks=2, width=5)
  vectors = np.asarray(one(X, INPUTS))
  assert vectors.shape == (G, S, 5)
  for task in (0, 1):
    np.testing.assert_array_equal(vectors[TASKS == task], np.tile(one.embedding[...][task], ((TASKS == task).sum(), 1)))
  assert np.isnan(vectors[TASKS == 2]).all()
  with pytest.raises(ValueError, match='needs tasks, but the model does not supply them'):
    one(X, RouterInputs())


def test_a_gate_that_is_aware_of_the_task_sees_token_and_task():
  made = router.build(papers.task_aware(num_tasks=3, task_width=5), 'config.router', dim=D, num_experts=E,
                      rngs=nnx.Rngs(0))
  assert made.score.kernel[...].shape == (D + 5, E)
  kernel, embedding = (np.asarray(v[...], np.float64) for v in (made.score.kernel, made.features.embedding))
  expected = np.asarray(X, np.float64) @ kernel[:D] + (embedding @ kernel[D:])[np.asarray(TASKS)]
  found = made.score(made.features(X, INPUTS), key=None, train=False).logits
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
