"""The PyTorch programs: transformers' Mixtral block and a dense SwiGLU floor. A process of the benchmark."""
import ctypes
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Callable

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from experiments.dispatch_benchmark import peers
from experiments.dispatch_benchmark.programs import Program

# transformers' implementations of the experts, by their name in Program.
IMPLEMENTATIONS = {'mixtral_eager': 'eager', 'mixtral_grouped_mm': 'grouped_mm'}


class Dense(torch.nn.Module):
  """A SwiGLU feed-forward on K copies of every token: the same number of multiplications as the experts."""

  def __init__(self, program: Program):
    """Gate and up projection are one matrix, as in the block it is compared with."""
    super().__init__()
    self.choices = program.choices
    self.gate_up = torch.nn.Linear(program.dim, 2 * program.hidden, bias=False)
    self.down = torch.nn.Linear(program.hidden, program.dim, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """x: <float>[1,T,D] -> <float>[1,T,D]."""
    gate, up = self.gate_up(torch.cat([x] * self.choices)).chunk(2, dim=-1)
    return self.down(torch.nn.functional.silu(gate) * up).sum(0, keepdim=True)


def build(program: Program):
  """Returns a function that runs `program` and returns its outputs, and its memory."""
  torch.manual_seed(0)
  if program.activation != 'swiglu':
    raise ValueError(f'Mixtral is SwiGLU, not {program.activation}.')
  layer = Dense(program) if program.what == 'dense' else _mixtral(program)
  x = torch.randn(1, program.tokens, program.dim, requires_grad=program.backward)
  target = torch.randn(1, program.tokens, program.dim)
  variables = [x, *layer.parameters()]

  def run():
    with torch.set_grad_enabled(program.backward):
      y = layer(x)
      return torch.autograd.grad((y * target).sum(), variables) if program.backward else y

  run()
  return run, dict(peak_bytes=peak_memory(run))


def peak_memory(run: Callable[[], None]) -> int | None:
  """The increase of this process's resident memory in bytes while `run` runs; None outside Linux."""
  if not os.access('/proc/self/clear_refs', os.W_OK):
    return None
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the peak, see proc(5)
  before = _resident('VmRSS')
  run()
  return _resident('VmHWM') - before


def _resident(field):
  return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])


def _mixtral(program):
  config = MixtralConfig(hidden_size=program.dim, intermediate_size=program.hidden, hidden_act='silu',
                         num_local_experts=program.num_experts, num_experts_per_tok=program.choices)
  config._experts_implementation = IMPLEMENTATIONS[program.what]
  layer = MixtralSparseMoeBlock(config)
  for parameter in layer.parameters():  # so that the block does not change the baseline
    torch.nn.init.normal_(parameter, std=program.dim**-0.5)
  return layer


if __name__ == '__main__':
  peers.serve(build, dict(python=platform.python_version(), torch=torch.__version__,
                          transformers=importlib.metadata.version('transformers')))
