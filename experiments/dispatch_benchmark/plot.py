"""Draws figure.png from cpu.json: time relative to dense as E, K, T and the load grow.

`python -m experiments.dispatch_benchmark.plot`
"""
import functools
import json
import pathlib

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.dispatch_benchmark import programs
from experiments.dispatch_benchmark.report import Report
from moejax.analysis import style

FOLDER = pathlib.Path(__file__).parent
LINES = {  # label -> case, program, process, activation
    'einsum': ('layers', 'einsum', 'moejax', 'gelu'),
    'gather': ('layers', 'gather', 'moejax', 'gelu'),
    'grouped': ('layers', 'grouped', 'moejax', 'gelu'),
    'grouped on ragged_dot': ('slow', 'ragged_dot', 'ragged_dot', 'gelu'),
    'grouped, SwiGLU': ('swiglu', 'grouped', 'moejax', 'swiglu'),
    'transformers eager, SwiGLU': ('slow', 'mixtral_eager', 'torch', 'swiglu'),
    'transformers grouped_mm, SwiGLU': ('swiglu', 'mixtral_grouped_mm', 'torch', 'swiglu'),
}

YELLOW = '#F0E442'  # good for areas, too faint for lines on white


def draw(results: dict) -> plt.Figure:
  """`results`: the content of cpu.json."""
  report, size = Report(results), Report(results).size
  colors = dict(zip(LINES, (color for color in style.experts(8) if color != YELLOW)))
  with style.theme('light'):
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.6), sharey=True, layout='constrained', width_ratios=(5, 3, 3, 3))
    for label, (case, what, peer, activation) in LINES.items():
      points = {experts: report.ratio(case, size.program(what, experts, activation=activation), peer=peer)
                for experts in size.experts}
      _line(axes[0], points, colors[label], label, dashed=peer != 'moejax')
    for label in ('gather', 'grouped'):
      program = functools.partial(size.program, label, size.middle)
      choices = {k: report.ratio('choices', program(choices=k)) for k in programs.CHOICES}
      tokens = {t: report.ratio('tokens', program(tokens=t)) for t in size.token_counts}
      _line(axes[1], choices, colors[label])
      _line(axes[2], tokens, colors[label])
    _line(axes[3], {n: report.ratio('load', size.program('block', size.middle, load=load))
                    for n, load in enumerate(programs.LOADS)}, colors['grouped'])
    for ax, title, ticks in zip(axes, ('experts E', f'choices K (E={size.middle})', f'tokens T (E={size.middle})'),
                                (size.experts, programs.CHOICES, size.token_counts)):
      ax.set_xscale('log', base=2)
      ax.set_xticks(ticks, ticks)
      ax.xaxis.set_minor_formatter(NullFormatter())
      ax.set_xlabel(title)
    axes[3].set_xticks(range(len(programs.LOADS)), programs.LOADS)
    axes[3].set_xlim(-0.4, len(programs.LOADS) - 0.6)
    axes[3].set_xlabel(f'expert_block alone (E={size.middle})')
    for ax in axes:
      ax.axhline(1, color='gray', linestyle='--', linewidth=1)
      ax.grid(axis='y')
    axes[0].set_yscale('log')
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes[0].yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].yaxis.minorticks_off()
    axes[0].set_ylabel('time over the dense floor\nforward and backward, quartiles')
    figure.legend(loc='outside lower center', ncols=4)
  return figure


def save(results: dict, folder: pathlib.Path) -> pathlib.Path:
  """Writes figure.png in `folder`."""
  path = folder / 'figure.png'
  figure = draw(results)
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path


def _line(ax, points, color, label=None, dashed=False):
  points = {x: ratio for x, ratio in points.items() if ratio}
  if points:
    medians, low, high = zip(*points.values())
    errors = [[middle - end for middle, end in zip(medians, low)], [end - middle for middle, end in zip(medians, high)]]
    ax.errorbar(list(points), medians, errors, color=color, label=label, marker='o', capsize=3,
                linestyle='--' if dashed else '-')


if __name__ == '__main__':
  print(f'{save(json.loads((FOLDER / "cpu.json").read_text()), FOLDER)} drawn.')
