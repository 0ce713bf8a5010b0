"""Small model configs for the tests of this folder."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from moejax import models
from moejax.functional import flatten, unflatten
from moejax.routing import papers

ATTENTION = dict(heads=2)
FEED_FORWARD = dict(hidden=16)
# The routers that a causal model may have, must refuse, or may accept when asked to.
DROPLESS = papers.top_k_dropless(k=2)
SWITCH = papers.switch(capacity_factor=1.)
GSHARD = papers.gshard(second='all')


def moe(router, **options):
  dropless = router['place']['name'] == 'dropless' and router['select']['name'] == 'top_k'
  return dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=router,
              dispatch=dict(name='grouped' if dropless else 'gather')) | options


def body(router=None, num_layers=2, sparse=dict(name='every', n=2), **options):
  """Keys of `Transformer`; dense if there is no router."""
  sparse = dict(moe=moe(router), sparse=sparse) if router else {}
  return dict(num_layers=num_layers, attention=ATTENTION, feed_forward=FEED_FORWARD) | sparse | options


def decoder(router=None, **options):
  return dict(name='decoder', vocab_size=13, dim=8) | body(router) | options


def vision(router=None, **options):
  return dict(name='vision', image_size=8, patch_size=4, num_classes=5, dim=8, channels=1) | body(router) | options


def encoder_decoder(encoder=None, decoder=None, **options):
  return dict(name='encoder_decoder', vocab_size=13, dim=8, encoder=body(encoder), decoder=body(decoder)) | options


def initialised(config):
  """(model, params, state, jitted apply); made once for each config.

  Parameters are drawn here, not by the model's own initialisers: those cost more to compile than anything tested, and
  start routers and heads near zero, where one model looks like another.
  """
  return _initialised(json.dumps(config))


@functools.cache
def _initialised(config):
  model = models.build(json.loads(config))
  draw = np.random.default_rng(0)
  params, state = model.shapes()
  values = {path: jnp.float32(draw.normal(1. if path.endswith('scale') else 0., 0.4, leaf.shape))
            for path, leaf in flatten(params).items()}
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
  return model, unflatten(values), zeros, jax.jit(model.apply, static_argnames='train')
