"""Figures from arrays. Pure functions: arrays in, a `matplotlib` Figure out; nothing is read, written or shown.

If a value has an expectation (the uniform load 1/E, an expert's overall share), colours show its multiple of that on
one scale for all figures: white as expected, blue-green more, brown less.
"""
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.patches
import numpy as np
from matplotlib import patheffects
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moejax.analysis import style

Line = tuple[np.ndarray, np.ndarray]  # steps and values
WIDTH = 9.6  # inches
# More lines have colours on a scale, so that some names tell where the others are.
MOST_NAMED_LINES = 12


def curves(panels: Mapping[str, Mapping[str, Line]], references: Mapping[str, tuple[str, float]] | None = None,
           percent: Sequence[str] = ()) -> Figure:
  """One panel for each `{y label: {line label: (steps, values)}}`.

  Args:
    panels: the lines of each panel; y labels include the unit.
    references: `{y label: (meaning, value)}`, drawn as dashed lines.
    percent: y labels whose values are shares, shown in percent.
  """
  figure, axes = _grid(len(panels), columns=2, height=3.3)
  for axis, (label, lines) in zip(axes, panels.items()):
    _lines(axis, lines)
    axis.set(xlabel='step', ylabel=label)
    if label in percent:
      top = max(1.1 * max(np.nanmax(values, initial=0) for _, values in lines.values()), 0.1)
      axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
      axis.set_ylim(0, top)
    if references and label in references:
      meaning, value = references[label]
      axis.axhline(value, linestyle=(0, (4, 3)), linewidth=1.3, color=matplotlib.rcParams['xtick.color'], label=meaning)
  _legends_above(figure, axes)
  return figure


def load_over_time(layers: Mapping[str, Line]) -> Figure:
  """`{layer: (steps [N], load [N,E])}` -> a step x expert heat map per layer, in multiples of 1/E."""
  figure, axes = _grid(len(layers), columns=3 if len(layers) == 3 else 2, height=2.7)
  for axis, (name, (steps, load)) in zip(axes, layers.items()):
    image = axis.pcolormesh(_edges(steps), np.arange(load.shape[1] + 1) - 0.5, _log2(load.T * load.shape[1]),
                            norm=_NORM, cmap=style.DIVERGING, rasterized=True)
    axis.set(title=name, xlabel='step')
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
  _label_left(axes, 'expert')
  _multiples_bar(figure, image, axes, 'load (multiples of 1/E)')
  return figure


def load_by_layer(loads: Mapping[str, np.ndarray]) -> Figure:
  """`{layer: load [E]}` -> one layer x expert heat map, in multiples of 1/E; layers may differ in E."""
  most = max(len(load) for load in loads.values())
  rows = np.full((len(loads), most), np.nan)
  for row, load in zip(rows, loads.values()):
    row[:len(load)] = load * len(load)
  figure, (axis,) = _grid(1, columns=1, height=1.5 + 0.42 * len(loads))
  image = _heat_map(axis, rows, list(loads), [str(e) for e in range(most)])
  axis.set(xlabel='expert')
  _multiples_bar(figure, image, [axis], 'load\n(multiples of 1/E)')
  return figure


def lift_by_expert(layers: Mapping[str, np.ndarray], labels: Sequence[str], what: str) -> Figure:
  """`{layer: lift [N,E]}` -> a `labels` x expert heat map per layer; lift 1 means no preference."""
  wide = max(lift.shape[1] for lift in layers.values()) > 16
  columns = 1 if wide else 3 if len(layers) == 3 and max(map(len, labels)) < 6 else 2
  figure, axes = _grid(len(layers), columns, height=1.5 + 0.27 * len(labels))
  for axis, (name, lift) in zip(axes, layers.items()):
    image = _heat_map(axis, lift, labels, [str(e) for e in range(lift.shape[1])])
    axis.set(title=name, xlabel='expert')
  _label_left(axes, what)
  _multiples_bar(figure, image, axes, 'times the\noverall share')
  return figure


def information(layers: Sequence[str], measured: Sequence[float], chance: Sequence[float], what: str) -> Figure:
  """Normalised mutual information between `what` and the expert, per layer, beside its chance level."""
  figure, (axis,) = _grid(1, columns=1, height=1.2 + 0.42 * len(layers))
  rows = np.arange(len(layers))
  axis.barh(rows, measured, height=0.6, color='#0072B2', label='measured')
  axis.plot(chance, rows, linestyle='', marker='|', markersize=20, markeredgewidth=3, color='#E69F00',
            label='chance: maximum of 20 shuffles')
  axis.set(yticks=rows, yticklabels=layers, xlabel=f'normalised mutual information of {what} and expert (0 to 1)')
  axis.set_xlim(0, max(1.15 * max([*measured, *chance]), 0.05))
  axis.set_ylim(len(layers) - 0.5, -0.5)
  for row, value in zip(rows, measured):
    axis.annotate(f'{value:.3f}', (value, row), xytext=(6, 0), textcoords='offset points', va='center')
  figure.legend(loc='outside upper right', ncols=2)
  return figure


def patches(images: np.ndarray, layers: Mapping[str, np.ndarray], titles: Sequence[str], num_experts: int) -> Figure:
  """The patches of images, coloured by expert.

  Args:
    images: <float>[N,H,W,C], any range.
    layers: `{layer: <int>[N,h,w]}` expert of each patch; -1: none.
    titles: one per image.
    num_experts: at most `style.MOST_COLOURS`.
  """
  colours = style.experts(num_experts)
  columns, rows = len(images), len(layers) + 1
  side = WIDTH / (columns + 0.8)
  figure = Figure(figsize=(WIDTH, side * rows + 0.75), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False)
  for column, image in enumerate(images):
    axes[0, column].imshow(_displayable(image), cmap='gray', vmin=0, vmax=1)
    axes[0, column].set_title(titles[column], fontsize=10, fontweight='normal')
    for row, experts in enumerate(layers.values(), 1):
      _patch_map(axes[row, column], _displayable(image), experts[column], colours)
  for row, name in enumerate(['input', *layers]):
    axes[row, 0].set_ylabel(name)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
  handles = [matplotlib.patches.Patch(color=colour, label=f'expert {e}') for e, colour in enumerate(colours)]
  if any((experts < 0).any() for experts in layers.values()):
    handles.append(matplotlib.patches.Patch(facecolor='black', edgecolor='white', hatch='////', label='none'))
  figure.legend(handles=handles, loc='outside lower center', ncols=9, handlelength=1, columnspacing=1.2)
  return figure


def spread(names: Sequence, most: int) -> list:
  """At most `most` of `names`, evenly spaced, including the first and the last."""
  if len(names) <= most:
    return list(names)
  return [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)]


# Multiples of the expected value are shown as log2, clipped to a quarter and four times.
_NORM = TwoSlopeNorm(vmin=-2, vcenter=0, vmax=2)


def _log2(multiples):
  return np.clip(np.log2(np.maximum(multiples, 1e-9)), -2, 2)


def _multiples_bar(figure, image, axes, label):
  bar = figure.colorbar(image, ax=list(axes), ticks=[-2, -1, 0, 1, 2], pad=0.015, aspect=25, label=label)
  bar.ax.set_yticklabels(['≤ 1/4', '1/2', '1', '2', '≥ 4'])
  bar.outline.set_visible(False)


def _heat_map(axis, multiples, row_labels, column_labels):
  rows, columns = multiples.shape
  values = _log2(multiples)
  image = axis.imshow(values, aspect='auto', cmap=style.DIVERGING, norm=_NORM, interpolation='nearest')
  axis.set(yticks=np.arange(rows), yticklabels=row_labels)
  step = -(-columns // 16)
  axis.set(xticks=np.arange(0, columns, step), xticklabels=column_labels[::step])
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)
  if columns <= 10:
    for (row, column), value in np.ndenumerate(multiples):
      if np.isfinite(value):
        ink = style.ink_on(image.cmap(image.norm(values[row, column])))
        axis.text(column, row, f'{value:.1f}', ha='center', va='center', fontsize=9, color=ink)
  return image


def _lines(axis, lines):
  for (label, (steps, values)), colour in zip(lines.items(), style.depths(len(lines))):
    axis.plot(steps, values, color=colour, label=label, marker='o' if len(steps) <= 20 else None, markersize=4)
  axis.grid(axis='y')
  axis.set_axisbelow(True)
  axis.set_xlim(left=0)
  axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _legends_above(figure, axes):
  """Legends above the axes, so that no line passes behind them, and no wider; the figure grows by their rows."""
  grid = axes[0].get_subplotspec().get_gridspec()
  size = FontProperties(size=matplotlib.rcParams['legend.fontsize']).get_size_in_points() / 72
  width = WIDTH / grid.ncols - 1.1  # without the labels of the y axis
  rows = np.zeros((grid.nrows, grid.ncols))
  for axis in axes:
    handles, labels = axis.get_legend_handles_labels()
    # References, which are dashed, come after the lines.
    lines = [i for i, handle in enumerate(handles) if handle.get_linestyle() == '-']
    chosen = [*spread(lines, MOST_NAMED_LINES), *(i for i in range(len(handles)) if i not in lines)]
    names = [_fitted(labels[i], width - 2 * size, size) for i in chosen]
    entry = 2 * size + max(_extent(name, size) for name in names)
    columns = int(np.clip((width + 1.2 * size) // (entry + 1.2 * size), 1, 4))
    title = f'{MOST_NAMED_LINES} of {len(lines)} lines:' if len(lines) > MOST_NAMED_LINES else None
    axis.legend([handles[i] for i in chosen], names, title=title, alignment='left', loc='lower left',
                bbox_to_anchor=(0, 1), borderaxespad=0.4, borderpad=0, ncols=columns, handlelength=1.2,
                handletextpad=0.8, columnspacing=1.2)
    place = axis.get_subplotspec()
    rows[place.rowspan.start, place.colspan.start] = -(-len(names) // columns) + (title is not None)
  figure.set_figheight(figure.get_figheight() + 1.6 * size * (rows.max(1) - 1).sum())


def _extent(text, size):
  # Drawn to whole pixels, letters take up to 5% more.
  return 1.05 * TextPath((0, 0), text, size=size).get_extents().width


def _fitted(text, width, size):
  """`text`, without its middle where it is wider than `width`."""
  shown, kept = text, len(text)
  while kept > 2 and (extent := _extent(shown, size)) > width:
    kept = max(min(kept - 1, int(len(shown) * width / extent) - 1), 2)
    shown = f'{text[:-(-kept // 2)]}…{text[-(kept // 2):]}'
  return shown


def _patch_map(axis, image, experts, colours):
  height, width = image.shape[:2]
  rows, columns = experts.shape
  grey = image if image.ndim == 2 else image.mean(-1)
  axis.imshow(grey, cmap='gray', vmin=0, vmax=1)
  tall, wide = height / rows, width / columns
  for (row, column), expert in np.ndenumerate(experts):
    corner = (column * wide - 0.5, row * tall - 0.5)
    if expert < 0:
      axis.add_patch(matplotlib.patches.Rectangle(corner, wide, tall, fill=False, hatch='////', edgecolor='white',
                                                  linewidth=0))
      continue
    axis.add_patch(matplotlib.patches.Rectangle(corner, wide, tall, facecolor=colours[expert], alpha=0.72, linewidth=0))
    if rows * columns <= 36:
      axis.text(corner[0] + wide / 2, corner[1] + tall / 2, str(expert), ha='center', va='center', fontsize=8.5,
                color='white', path_effects=[patheffects.withStroke(linewidth=2, foreground='black')])


def _displayable(image):
  low, high = float(image.min()), float(image.max())
  image = (image - low) / (high - low if high > low else 1.)
  return image[..., 0] if image.shape[-1] not in (3, 4) else image[..., :3]


def _edges(steps):
  steps = np.asarray(steps, float)
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5])
  middle = (steps[1:] + steps[:-1]) / 2
  return np.concatenate([[steps[0] - (middle[0] - steps[0])], middle, [steps[-1] + (steps[-1] - middle[-1])]])


def _label_left(axes, label):
  for axis in axes:
    if axis.get_subplotspec().is_first_col():
      axis.set_ylabel(label)


def _grid(count, columns, height):
  columns = min(columns, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(WIDTH, height * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for unused in axes[count:]:
    unused.remove()
  return figure, axes[:count]
