"""Weights of `transformers` models as our parameter trees. For tests only."""
import jax.numpy as jnp
import numpy as np
import torch

from moejax.functional import unflatten


def randomise(model, seed=0):
  """Weights large enough that routers disagree and every part of the model shows in its output."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      # Vectors are norm scales and biases.
      parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
  return model.eval()


class Weights:
  """Our parameters by path, collected from a state dict."""

  def __init__(self, model):
    self._source = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    self._flat = {}

  @property
  def tree(self):
    return unflatten({path: jnp.asarray(array) for path, array in self._flat.items()})

  def copy(self, path, name, transform=lambda array: array):
    self._flat[path] = transform(self._source[name])

  def linear(self, path, name):
    """torch keeps (out, in)."""
    self.copy(path, name, lambda w: w.T)

  def stack(self, path, names):
    """Matrices of experts."""
    self._flat[path] = np.stack([self._source[name].T for name in names])

  def attention(self, path, names, head_dim, biases=False):
    """names: the four projections: queries, keys, values, out; (H * head_dim, D), and out the other way round."""
    for ours, name in zip(('query', 'key', 'value'), names):
      self.copy(f'{path}/{ours}', f'{name}.weight', lambda w: w.T.reshape(w.shape[1], -1, head_dim))
    self.copy(f'{path}/out', f'{names[3]}.weight', lambda w: w.T.reshape(-1, head_dim, w.shape[0]))
    if biases:
      for ours, name in zip(('query', 'key', 'value'), names):
        self.copy(f'{path}/{ours}_bias', f'{name}.bias', lambda b: b.reshape(-1, head_dim))
      self.copy(f'{path}/out_bias', f'{names[3]}.bias')


def llama(model, head_dim):
  """LlamaForCausalLM and MixtralForCausalLM."""
  weights = Weights(model)
  weights.copy('embedding/table', 'model.embed_tokens.weight')
  weights.copy('final_norm/scale', 'model.norm.weight')
  weights.linear('head/linear/kernel', 'lm_head.weight')
  for i in range(model.config.num_hidden_layers):
    ours, theirs = f'blocks/{i}', f'model.layers.{i}'
    weights.copy(f'{ours}/attention_norm/scale', f'{theirs}.input_layernorm.weight')
    weights.copy(f'{ours}/feed_forward_norm/scale', f'{theirs}.post_attention_layernorm.weight')
    weights.attention(f'{ours}/attention', [f'{theirs}.self_attn.{x}_proj' for x in 'qkvo'], head_dim)
    if hasattr(model.config, 'num_local_experts'):
      hidden = model.config.intermediate_size
      experts = f'{theirs}.mlp.experts'
      weights.linear(f'{ours}/moe/router/score/kernel', f'{theirs}.mlp.gate.weight')
      weights.copy(f'{ours}/moe/experts/wg', f'{experts}.gate_up_proj', lambda w: w[:, :hidden].swapaxes(1, 2))
      weights.copy(f'{ours}/moe/experts/wi', f'{experts}.gate_up_proj', lambda w: w[:, hidden:].swapaxes(1, 2))
      weights.copy(f'{ours}/moe/experts/wo', f'{experts}.down_proj', lambda w: w.swapaxes(1, 2))
    else:
      for name, projection in (('wg', 'gate'), ('wi', 'up'), ('wo', 'down')):
        weights.linear(f'{ours}/feed_forward/{name}', f'{theirs}.mlp.{projection}_proj.weight')
  return weights.tree


def t5(model, head_dim, feed_forward):
  """T5ForConditionalGeneration and SwitchTransformersForConditionalGeneration.

  feed_forward: our names of the feed-forward matrices to theirs.
  """
  weights = Weights(model)
  weights.copy('embedding/table', 'shared.weight')
  if model.lm_head.weight is not model.shared.weight:
    weights.linear('head/linear/kernel', 'lm_head.weight')
  for side in ('encoder', 'decoder'):
    first = f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    weights.copy(f'{side}_encoding/table', first)
    weights.copy(f'{side}/final_norm/scale', f'{side}.final_layer_norm.weight')
    for i, block in enumerate(getattr(model, side).block):
      ours, theirs = f'{side}/blocks/{i}', f'{side}.block.{i}.layer'
      weights.copy(f'{ours}/attention_norm/scale', f'{theirs}.0.layer_norm.weight')
      weights.attention(f'{ours}/attention', [f'{theirs}.0.SelfAttention.{x}' for x in 'qkvo'], head_dim)
      if side == 'decoder':
        weights.copy(f'{ours}/cross_attention_norm/scale', f'{theirs}.1.layer_norm.weight')
        weights.attention(f'{ours}/cross_attention', [f'{theirs}.1.EncDecAttention.{x}' for x in 'qkvo'], head_dim)
      last = len(block.layer) - 1
      weights.copy(f'{ours}/feed_forward_norm/scale', f'{theirs}.{last}.layer_norm.weight')
      if getattr(block, 'is_sparse', False):
        mlp, experts = f'{theirs}.{last}.mlp', model.config.num_experts
        weights.linear(f'{ours}/moe/router/score/kernel', f'{mlp}.router.classifier.weight')
        for name, projection in feed_forward.items():
          weights.stack(f'{ours}/moe/experts/{name}',
                        [f'{mlp}.experts.expert_{e}.{projection}.weight' for e in range(experts)])
      else:
        mlp = next(name for name in ('DenseReluDense', 'mlp') if hasattr(block.layer[last], name))
        for name, projection in feed_forward.items():
          weights.linear(f'{ours}/feed_forward/{name}', f'{theirs}.{last}.{mlp}.{projection}.weight')
  return weights.tree


def vit(model, head_dim):
  """ViTForImageClassification."""
  weights = Weights(model)
  embeddings = 'vit.embeddings'
  # Convolution kernels are (out, channels, rows, columns).
  weights.copy('patches/kernel', f'{embeddings}.patch_embeddings.projection.weight',
               lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]))
  weights.copy('patches/bias', f'{embeddings}.patch_embeddings.projection.bias')
  weights.copy('class_token', f'{embeddings}.cls_token', lambda w: w[0, 0])
  weights.copy('encoding/table', f'{embeddings}.position_embeddings', lambda w: w[0])
  weights.linear('head/kernel', 'classifier.weight')
  weights.copy('head/bias', 'classifier.bias')

  def norm(ours, theirs):
    weights.copy(f'{ours}/scale', f'{theirs}.weight')
    weights.copy(f'{ours}/bias', f'{theirs}.bias')

  norm('final_norm', 'vit.layernorm')
  for i in range(model.config.num_hidden_layers):
    ours, theirs = f'blocks/{i}', f'vit.layers.{i}'
    norm(f'{ours}/attention_norm', f'{theirs}.layernorm_before')
    norm(f'{ours}/feed_forward_norm', f'{theirs}.layernorm_after')
    weights.attention(f'{ours}/attention', [f'{theirs}.attention.{x}_proj' for x in 'qkvo'], head_dim, biases=True)
    for number, (kernel, bias) in enumerate((('wi', 'bi'), ('wo', 'bo')), 1):
      weights.linear(f'{ours}/feed_forward/{kernel}', f'{theirs}.mlp.fc{number}.weight')
      weights.copy(f'{ours}/feed_forward/{bias}', f'{theirs}.mlp.fc{number}.bias')
  return weights.tree
