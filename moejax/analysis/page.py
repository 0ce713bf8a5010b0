"""The report as one self-contained HTML file of text, tables and pictures."""
import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moejax.analysis import style

_STYLE = '''
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f3f5f7; --ink: #1f2328; --soft: #59636e; --line: #d7dce2;
        --accent: #0b62a8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151b23; --ground: #0d1117; --ink: #e6edf3; --soft: #9aa4af; --line: #333b45; --accent: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main, header, nav { max-width: 1040px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.75rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 48px 0 8px; }
h3 { font-size: 1.05rem; margin: 28px 0 6px; }
p { margin: 8px 0; max-width: 75ch; }
a { color: var(--accent); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 6px 20px; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
figure, .panel { margin: 16px 0; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
                 padding: 16px; }
figure picture { display: block; overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
figcaption { margin-top: 10px; color: var(--soft); font-size: .93rem; max-width: 85ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre, .tokens { font-family: ui-monospace, 'DejaVu Sans Mono', monospace; font-size: .88rem; }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--accent); }
.tokens { line-height: 1.9; overflow-wrap: anywhere; } .tokens span { padding: 2px 0; } .tokens .none { opacity: .55; }
.key span { padding: 2px 8px; margin-right: 6px; border-radius: 4px; }
'''


def document(title: str, intro: str, sections: Iterable[tuple[str, str]]) -> str:
  """A page of `(heading, html)` sections with a table of contents."""
  sections = list(sections)
  links = ''.join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name, _ in sections)
  body = ''.join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{inner}</section>' for name, inner in sections)
  # The empty icon keeps browsers from requesting /favicon.ico.
  return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
          f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
          f'<style>{_STYLE}</style></head><body><header><h1>{escape(title)}</h1>{intro}</header>'
          f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main></body></html>\n')


def picture(folder: Path, name: str, draw: Callable[[], Figure], alt: str, caption: str) -> str:
  """A figure with its caption, in a light and a dark version; also written to `folder` as `<name>.png` and `_dark`.

  `alt` describes the picture for screen readers; `caption` says how to read it and what is healthy.
  """
  sources = {}
  for theme, suffix in (('light', ''), ('dark', '_dark')):
    with style.theme(theme):
      buffer = io.BytesIO()
      draw().savefig(buffer, format='png')
    (folder / f'{name}{suffix}.png').write_bytes(buffer.getvalue())
    sources[theme] = 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()
  return (f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
          f'<img src="{sources["light"]}" alt="{escape(alt)}"></picture><figcaption>{caption}</figcaption></figure>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """An HTML table; numeric columns are right-aligned, everything is escaped."""
  rows = [list(row) for row in rows]
  numeric = [all(row[i] in ('', None) or isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
  def cells(tag, row):
    return ''.join(f'<{tag}{" class=number" if right else ""}>{escape(number(x))}</{tag}>'
                   for x, right in zip(row, numeric))
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  return (f'<div class="panel scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table>'
          '</div>')


def cards(values: Mapping[str, object]) -> str:
  """Cards with the key figures."""
  inner = ''.join(f'<div class="card"><b>{escape(number(value))}</b><span>{escape(name)}</span></div>'
                  for name, value in values.items())
  return f'<div class="cards">{inner}</div>'


def details(summary: str, inner: str) -> str:
  """A collapsed section."""
  return f'<details><summary>{escape(summary)}</summary>{inner}</details>'


def paragraph(text: str) -> str:
  """A paragraph of plain text."""
  return f'<p>{escape(text)}</p>'


def code(text: str) -> str:
  """Preformatted text."""
  return f'<pre><code>{escape(text)}</code></pre>'


def coloured_tokens(texts: Sequence[str], experts: Sequence[int], num_experts: int) -> str:
  """Running text, each token on the colour of its expert (-1: no expert), which hovering names."""
  colours = style.experts(num_experts)
  def span(background, label, inner):
    return (f'<span style="background:{background};color:{style.ink_on(background)}" title="{label}">'
            f'{escape(inner)}</span>')
  key = ''.join(span(colour, f'expert {e}', str(e)) for e, colour in enumerate(colours))
  body = ''.join(span(colours[e], f'expert {e}', text) if e >= 0 else
                 f'<span class="none" title="no expert">{escape(text)}</span>' for text, e in zip(texts, experts))
  return (f'<div class="panel"><p class="key">expert: {key}</p>'
          f'<div class="tokens">{body.replace("⏎", "⏎<br>")}</div></div>')


def number(value: object) -> str:
  """Readable: 1,234,567; 0.9731; 1.2e-05. None, JSON's null for non-finite values, becomes 'not finite'."""
  if value is None:
    return 'not finite'
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if float(value).is_integer() and abs(value) < 1e15:
    return f'{int(value):,}'
  return f'{value:.4g}'


def short(count: float) -> str:
  """595 k, 1.81 M, 13.1 B."""
  for size, unit in ((1e9, ' B'), (1e6, ' M'), (1e3, ' k')):
    if count >= size:
      return f'{count / size:.3g}{unit}'
  return f'{count:.3g}'


def escape(text: object) -> str:
  """For HTML text and attributes."""
  return html.escape(str(text), quote=True)


def _anchor(name):
  return name.lower().replace(' ', '-')
