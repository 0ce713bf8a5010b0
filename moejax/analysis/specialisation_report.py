"""The section of the report on what experts specialise in: classes and patches of images, kinds of text tokens."""
import dataclasses
import math
from pathlib import Path

import numpy as np

from moejax.analysis import page, plots, specialisation, style, token_kinds
from moejax.analysis.routes import BatchRoutes
from moejax.evaluation.few_shot import rank_in_class

MOST_LABELS = 40
MOST_LAYERS = 6
IMAGES = 8
TEXT_TOKENS = 480
SIDES = {'': 'Text', 'encoder_': 'Text of the encoder', 'decoder_': 'Text of the decoder'}

INFORMATION_CAPTION = (
    'Normalised mutual information of {what} and expert: 0 independent, 1 each determines the other. The orange mark '
    'is the chance level, measured on the same {units} with shuffled labels. Healthy: clearly above the mark in at '
    'least some layers. At the mark, experts do not specialise by {what}.')
LIFT_CAPTION = (
    'How much more often than average a {what} is sent to the expert: white (1) no preference, blue-green more, brown '
    'less. Healthy: some dark cells in each column. An all-white column is an expert that does not specialise by '
    '{what}.')


@dataclasses.dataclass(frozen=True)
class Labels:
  """Attributes:
    what: name of the property ('class').
    units: name of the labelled things ('images').
    names: of the C labels.
    members: <float>[N,C]: the degree to which each unit has each label.
    shares: `{layer: <float>[N,E]}`: share of each expert in each unit.
  """
  what: str
  units: str
  names: list[str]
  members: np.ndarray
  shares: dict[str, np.ndarray]


def section(folder: Path, routes: BatchRoutes, pipeline) -> str:
  """The HTML of the section; pictures are also written to `folder`."""
  if not routes.layers:
    return page.paragraph('This model is dense, so it has no experts that could specialise.')
  if 'image' in routes.batch:
    labels = class_labels(routes)
    modality = specialities(folder, 'modality', modality_labels(routes)) if 'tokens' in routes.batch else ''
    return (modality + specialities(folder, 'class', labels) + soft_reading(folder, routes, labels) +
            image_patches(folder, routes))
  parts = []
  for prefix, title in SIDES.items():
    layers = [name for name in routes.layers if name.startswith(prefix)]
    if f'{prefix}tokens' in routes.batch and layers:
      parts.append(f'<h3>{title}</h3>' + text(folder, routes, pipeline.tokenizer, prefix, layers))
  return ''.join(parts) or page.paragraph('The specialisation of experts is not shown for this kind of model.')


def modality_labels(routes: BatchRoutes) -> Labels:
  """Whether a token belongs to an image or to its text, which follows it."""
  padding = routes.batch['segments'] == 0
  shares = {}
  for name, layer in routes.layers.items():
    real = np.pad(~padding, ((0, 0), (layer.weight.shape[1] - padding.shape[1], 0)), constant_values=True)
    shares[name] = specialisation.shares(layer.weight)[real].astype(np.float64)
  text = np.broadcast_to(np.arange(real.shape[1]) >= real.shape[1] - padding.shape[1], real.shape)[real]
  return Labels('modality', 'tokens', ['image', 'text'], specialisation.membership(text.astype(int), 2), shares)


def class_labels(routes: BatchRoutes, field: str = 'weight') -> Labels:
  """Classes of images; the shares of an image are summed over its tokens."""
  if 'labels' in routes.batch:
    members = specialisation.shares(routes.batch['labels'].astype(np.float64))
  else:
    members = specialisation.membership(routes.batch['label'], int(routes.batch['label'].max()) + 1)
  shares = {name: specialisation.shares(getattr(layer, field)).sum(1).astype(np.float64)
            for name, layer in routes.layers.items() if getattr(layer, field) is not None}
  return Labels('class', 'images', [str(c) for c in range(members.shape[1])], members, shares)


def specialities(folder: Path, name: str, labels: Labels) -> str:
  """Mutual information of labels and experts, and which labels go to which expert."""
  tables = {layer: specialisation.table(labels.members, share) for layer, share in labels.shares.items()}
  measured = [specialisation.normalised_mutual_information(table) for table in tables.values()]
  chance = [specialisation.chance_level(labels.members, share) for share in labels.shares.values()]
  best = list(tables)[int(np.argmax(measured))]
  shown = {layer: tables[layer] for layer in plots.spread(list(tables), MOST_LAYERS)}
  rows = specialisation.most_telling(list(shown.values()), MOST_LABELS)
  names = [labels.names[row] for row in rows]
  lifts = {layer: specialisation.lift(table)[rows] for layer, table in shown.items()}
  words = dict(what=labels.what, units=labels.units)
  left_out = '' if len(rows) == len(labels.names) else (
      f' Only the {len(rows)} most informative of {len(labels.names)} are shown.')
  return page.picture(
      folder, f'{name}_information', lambda: plots.information(list(tables), measured, chance, labels.what),
      alt=f'Bars of the normalised mutual information between {labels.what} and expert for each sparse layer; '
          f'the highest is {max(measured):.3f} in {best}.',
      caption=INFORMATION_CAPTION.format(**words)) + page.picture(
      folder, f'{name}_by_expert', lambda: plots.lift_by_expert(lifts, names, labels.what),
      alt=f'Heat maps of {labels.what} by expert, one for each of the layers {", ".join(shown)}.',
      caption=LIFT_CAPTION.format(**words) + left_out)


def soft_reading(folder: Path, routes: BatchRoutes, written: Labels) -> str:
  """The inputs of experts in soft plans."""
  labels = class_labels(routes, 'read')
  if not labels.shares:
    return ''
  lifts = {name: specialisation.lift(specialisation.table(labels.members, labels.shares[name]))
           for name in plots.spread(list(labels.shares), MOST_LAYERS)}
  rows = specialisation.most_telling([specialisation.table(written.members, s) for s in labels.shares.values()],
                                     MOST_LABELS)
  return page.picture(
      folder, 'class_read_by_expert',
      lambda: plots.lift_by_expert({name: lift[rows] for name, lift in lifts.items()},
                                   [labels.names[row] for row in rows], 'class'),
      alt='Heat maps of class by expert, for the inputs of the slots of each expert.',
      caption='In soft routing, slots read mixtures of tokens (shown here), and tokens receive mixtures of slots '
              '(shown above). ' + LIFT_CAPTION.format(what='class'))


def image_patches(folder: Path, routes: BatchRoutes) -> str:
  """Images of different classes, with patches coloured by their first expert."""
  words = routes.batch['tokens'].shape[1] if 'tokens' in routes.batch else 0  # after the patches
  grids = {name: grid for name, layer in routes.layers.items() if (grid := patch_grid(layer.weight.shape[1] - words))}
  most = max(layer.num_experts for layer in routes.layers.values())
  if not grids or most > style.MOST_COLOURS:
    return '' if grids else page.paragraph('Tokens of this model do not form a grid of patches, so they are not drawn.')
  chosen = one_of_each(routes.batch)
  maps = {}
  for name in plots.spread(list(grids), 4):
    prefix, side = grids[name]
    maps[name] = routes.layers[name].first[chosen, prefix:prefix + side * side].reshape(-1, side, side)
  titles = [f'class {routes.batch["label"][i]}' if 'label' in routes.batch else '' for i in chosen]
  return page.picture(
      folder, 'patches', lambda: plots.patches(routes.batch['image'][chosen], maps, titles, most),
      alt=f'{len(chosen)} images above maps of their patches, coloured by the expert with the largest weight, '
          f'for the layers {", ".join(maps)}.',
      caption='Each patch has the colour of the expert with the largest weight in its output; hatched patches were '
              'dropped. Look for experts that follow content (strokes, edges, background) rather than position, and '
              'for missing colours.')


def text(folder: Path, routes: BatchRoutes, tokenizer, prefix: str, layers: list[str]) -> str:
  """Kinds of tokens by expert, typical tokens of each expert, and running text coloured by expert."""
  ids = routes.batch[f'{prefix}tokens']
  valid = {name: routes.valid(name) for name in layers}
  kinds, names = token_kinds.kinds_of(tokenizer, ids[valid[layers[0]]])
  shares = {name: specialisation.shares(routes.layers[name].weight)[valid[name]].astype(np.float64) for name in layers}
  labels = Labels('kind of token', 'tokens', names, specialisation.membership(kinds, len(names)), shares)
  pictures = specialities(folder, f'{prefix}kind', labels) if len(names) > 1 else page.paragraph(
      'All tokens are of one kind, so kinds are not shown.')
  typical = page.details('Show typical tokens of each expert', ''.join(
      f'<h3>{name}</h3>' + typical_tokens(tokenizer, ids[valid[name]], shares[name])
      for name in plots.spread(layers, MOST_LAYERS)))
  return pictures + typical + running_text(routes, tokenizer, ids, layers)


def typical_tokens(tokenizer, ids: np.ndarray, share: np.ndarray, count: int = 8) -> str:
  """A table: for every expert, its most over-represented tokens."""
  present, index = np.unique(ids, return_inverse=True)
  table = np.zeros((len(present), share.shape[1]))
  np.add.at(table, index, share)
  lift = specialisation.lift(table)
  score = np.where(table > 0, table * np.log(np.where(table > 0, lift, 1.)), -np.inf)
  rows = []
  for expert in range(share.shape[1]):
    best = [i for i in np.argsort(-score[:, expert], kind='stable')[:count] if score[i, expert] > 0]
    spelled = [f'{token_kinds.visible(tokenizer.decode(present[i:i + 1]))} ×{lift[i, expert]:.1f}' for i in best]
    rows.append([f'expert {expert}', ' · '.join(spelled) or 'none'])
  return page.table(['', 'tokens, with their frequency here relative to the average'], rows)


def running_text(routes: BatchRoutes, tokenizer, ids: np.ndarray, layers: list[str]) -> str:
  """The beginning of the first example, coloured by each token's first expert."""
  if max(routes.layers[name].num_experts for name in layers) > style.MOST_COLOURS:
    return ''
  parts = []
  for name in plots.spread(layers, 4):
    layer, real = routes.layers[name], routes.valid(name)[0]
    pieces = [token_kinds.visible(tokenizer.decode(np.array([id]))) for id in ids[0][real][:TEXT_TOKENS]]
    parts.append(page.details(f'Show running text coloured by the experts of {name}', page.coloured_tokens(
        pieces, layer.first[0][real][:TEXT_TOKENS].tolist(), layer.num_experts)))
  return ''.join(parts)


def patch_grid(tokens: int) -> tuple[int, int] | None:
  """(tokens before the patches, side of the grid) if the tokens are a square of patches, or one more; else None."""
  for prefix in (0, 1):
    side = math.isqrt(max(tokens - prefix, 0))
    if side > 1 and side * side == tokens - prefix:
      return prefix, side
  return None


def one_of_each(batch: dict[str, np.ndarray]) -> np.ndarray:
  """Positions of `IMAGES` examples: the first of each class, then the second of each, and so on."""
  if 'label' not in batch:
    return np.arange(min(IMAGES, len(batch['image'])))
  return np.lexsort((batch['label'], rank_in_class(batch['label'])))[:IMAGES]
