"""PyTorch's grouped product for the GPU benchmark, and its dense floor. Runs as a process, like `gpu_programs`."""
import platform
import sys

import torch

from experiments.dispatch_benchmark import gpu_timing


def build(shape: dict, load: str):
  """For `gpu_timing.serve`."""
  from experiments.dispatch_benchmark.gpu_programs import group_sizes
  rows, groups, dim, hidden = (shape[name] for name in ('rows', 'experts', 'dim', 'hidden'))
  torch.manual_seed(0)
  normal = lambda *size: torch.randn(*size, device='cuda', dtype=torch.bfloat16)
  x, w = normal(rows, dim), normal(groups, dim, hidden) / dim**0.5
  ends = torch.tensor(group_sizes(load, rows, groups).cumsum(), device='cuda', dtype=torch.int32)
  runs, errors = {'dense forward': _run(lambda: x @ w[0])}, {}
  try:
    grouped = _run(lambda: torch._grouped_mm(x, w, offs=ends))
    grouped(1)
    runs['torch forward'] = grouped
  except (AttributeError, RuntimeError) as error:
    errors['torch forward'] = str(error).splitlines()[0][:300]
  return runs, errors, {}


def _run(function):
  def run(calls):
    for _ in range(calls):
      function()
    torch.cuda.synchronize()
  return run


if __name__ == '__main__':
  del sys.argv[1]  # the peer's name, unused: there is only one
  gpu_timing.serve(build, dict(python=platform.python_version(), torch=torch.__version__,
                               device=torch.cuda.get_device_name()))
