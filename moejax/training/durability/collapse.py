"""The alarm for collapsed routers: nearly all tokens choose the same expert."""
from collections.abc import Callable
from typing import Any

from moejax.models.mixtures import mixture_of
from moejax.routing.stages import SELECTIONS

# Consecutive logged rows after which it is not chance.
ROWS = 3
_NEVER_LEARNED = ('hash', 'random')


class CollapseAlarm:
  """Reports when a router collapses, and when it has recovered.

  Only learned routers can collapse, and only where there are more experts than a token chooses.

  Args:
    setup: of the run.
    rows: logged before the run resumed.
  """

  def __init__(self, setup, rows: list[dict[str, Any]]):
    self._limit, self._model = setup.recovery.collapse, setup.config.model
    self._rows: dict[str, int] = {}  # Latest consecutive rows at the limit, by layer.
    for row in rows:
      self.look(row['step'], row, lambda line: None)

  def look(self, step: int, row: dict[str, Any], say: Callable[[str], None]) -> dict[str, float]:
    """Metrics to add to the `row` of step `step`: `alarm/collapse/<layer>`, 1 from the third row in a row at the limit.

    `router/<layer>/load` [E] sums to 1 over experts; a token makes K choices, so K times the load is the share of
    tokens that choose the expert.
    """
    alarms = {}
    for name, load in row.items():
      if not (name.startswith('router/') and name.endswith('/load')):
        continue
      layer = name.removeprefix('router/').removesuffix('/load')
      chosen = choices(self._model, layer)
      if chosen is None or len(load) <= chosen:
        continue
      # A non-finite load is null in metrics.jsonl.
      loads = [share if share is not None else float('nan') for share in load]
      share = chosen * max(loads)
      before = self._rows.get(layer, 0)
      self._rows[layer] = before + 1 if share >= self._limit else 0
      if self._rows[layer] == ROWS:
        say(f'Step {step}: the router of {layer} has collapsed: {min(share, 1):.0%} of the tokens choose expert '
            f'{loads.index(max(loads))} of {len(load)}. Usual remedies: more weight on its balance loss, noise on its '
            'logits, a smaller learning rate.')
      if before >= ROWS and not self._rows[layer]:
        say(f'Step {step}: the router of {layer} is no longer collapsed: {share:.0%} of the tokens choose its busiest '
            'expert.')
      alarms[f'alarm/collapse/{layer}'] = float(self._rows[layer] >= ROWS)
    return alarms


def choices(model_config: dict, layer: str) -> int | None:
  """K, the choices of a token in 'block_03' or 'encoder_block_03'; 1 where experts choose tokens or process all.

  None for a router that is not learned.
  """
  where, moe = mixture_of(model_config, layer)
  if not moe or moe['router']['score']['name'] in _NEVER_LEARNED:
    return None
  experts = moe['num_experts'] if isinstance(moe['num_experts'], int) else max(moe['num_experts'])
  return SELECTIONS.build(moe['router']['select'], f'{where}.router.select', num_experts=experts).k or 1
