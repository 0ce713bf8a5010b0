"""The style of figures: a light and a dark theme, and colours safe for colour blindness."""
import contextlib
from collections.abc import Iterator

import matplotlib
import matplotlib.colors
import numpy as np

THEMES = {
    'light': dict(paper='#ffffff', ink='#1f2328', faint='#d7dce2', soft='#59636e'),
    'dark': dict(paper='#151b23', ink='#e6edf3', faint='#333b45', soft='#9aa4af'),
}

# Okabe and Ito (2008), with brown for black so that all show on both themes; then the same eight, darker.
_DISTINCT = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#8B5A2B')
MOST_COLOURS = 16

# Diverging, safe for all common forms of colour blindness: below expectation brown, above it blue-green.
DIVERGING = 'BrBG'
SEQUENTIAL = 'viridis'


def experts(count: int) -> list[str]:
  """One colour per expert, at most `MOST_COLOURS`."""
  if count > MOST_COLOURS:
    raise ValueError(f'there are {count} experts, but only {MOST_COLOURS} distinct colours.')
  rgb = [matplotlib.colors.to_rgb(colour) for colour in _DISTINCT]
  darker = [matplotlib.colors.to_hex((0.55 * red, 0.55 * green, 0.55 * blue)) for red, green, blue in rgb]
  return [*_DISTINCT, *darker][:count]


def depths(count: int) -> list:
  """One colour per line: distinct for a few, a scale from early to late for many."""
  if count <= 6:
    return list(_DISTINCT[:count])
  return [matplotlib.colormaps[SEQUENTIAL](x) for x in np.linspace(0.05, 0.9, count)]


def ink_on(colour) -> str:
  """Black or white, whichever reads better on `colour` (relative luminance, WCAG 2)."""
  rgb = np.array(matplotlib.colors.to_rgb(colour))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return 'black' if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else 'white'


@contextlib.contextmanager
def theme(name: str) -> Iterator[None]:
  """Within it, figures use this theme; no display is needed."""
  colours = THEMES[name]
  with matplotlib.rc_context({
      'figure.facecolor': colours['paper'], 'savefig.facecolor': colours['paper'], 'axes.facecolor': colours['paper'],
      'text.color': colours['ink'], 'axes.labelcolor': colours['ink'], 'axes.titlecolor': colours['ink'],
      'xtick.color': colours['soft'], 'ytick.color': colours['soft'], 'xtick.labelcolor': colours['ink'],
      'ytick.labelcolor': colours['ink'], 'axes.edgecolor': colours['soft'], 'grid.color': colours['faint'],
      'font.family': 'DejaVu Sans', 'font.size': 11, 'axes.titlesize': 12, 'axes.titleweight': 'bold',
      'axes.labelsize': 11, 'xtick.labelsize': 10, 'ytick.labelsize': 10, 'legend.fontsize': 10,
      'legend.frameon': False, 'axes.grid': False, 'grid.linewidth': 0.8, 'axes.spines.top': False,
      'axes.spines.right': False, 'lines.linewidth': 2, 'figure.dpi': 100, 'savefig.dpi': 150,
  }):
    yield
