"""The figure of studies that compare models: a dot per run, a line at the mean."""
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from experiments import runner
from moejax.analysis import style


def strip(study: str, metric: str, label: str, percent: bool = False,
          reference: tuple[str, float] | None = None) -> plt.Figure:
  """Every run's `metric` by model, in the order of the sweep; `reference` is a dashed line with a name."""
  summary = runner.summarize(runner.load(study), metric)
  values = {name: [run['metrics'][metric] for run in runner.load(study)['runs'] if run['name'] == name]
            for name in summary}
  colors = style.experts(len(values))
  with style.theme('light'):
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(values) + 1.2), layout='constrained')
    for row, (name, numbers) in enumerate(values.items()):
      color = colors[row]
      axes.plot([summary[name][0]] * 2, [row - 0.3, row + 0.3], color=color, linewidth=3)
      axes.plot(numbers, [row] * len(numbers), 'o', color=color, alpha=0.6)
    if reference:
      axes.axvline(reference[1], linestyle='--', color='gray', linewidth=1)
      axes.annotate(reference[0], (reference[1], -0.45), textcoords='offset points', xytext=(4, 0), color='gray')
    axes.set_yticks(range(len(values)), values)
    axes.set_ylim(len(values) - 0.5, -0.6)
    axes.set_xlabel(f'{label}\none dot a seed, a line at the mean')
    if percent:
      axes.xaxis.set_major_formatter(PercentFormatter(1))
  return figure


def save(study: str, figure: plt.Figure) -> None:
  """Writes the study's figure.png."""
  path = runner.ROOT / 'experiments' / study / 'figure.png'
  figure.savefig(path, dpi=120)
  print(f'{path.relative_to(runner.ROOT)} drawn.')
