"""A block with two mixtures of experts, from training to the report."""
import digits_config
import pytest

import moejax
from moejax import train
from moejax.routing import papers
from moejax.training import metrics

LAYERS = ['block_00/first', 'block_00/second', 'block_01']


@pytest.mark.slow
def test_each_router_of_a_block_has_its_place_in_metrics_alarms_routes_and_report(tmp_path):
  config = digits_config.get_config('6')
  moe = config.model.moe.to_dict()
  attention, first = dict(name='attention', heads=2), dict(name='moe', **moe)
  second = first | dict(num_experts=2, router=papers.switch(), dispatch=dict(name='gather'))
  for key in ('attention', 'feed_forward', 'sparse', 'moe'):
    del config.model[key]
  config.model.update(dict(
      num_layers=2, blocks=dict(two=dict(attention=attention, first=first, second=second), one=dict(attention=attention, moe=first)),
      pattern=dict(name='cycle', kinds=('two', 'one'))))
  config.report.at = 'end'
  train.run(config, tmp_path, lambda line: None)

  row = metrics.read(tmp_path)[-1]
  assert [len(row[f'router/{layer}/load']) for layer in LAYERS] == [4, 2, 4]
  assert [layer for layer in LAYERS if f'alarm/collapse/{layer}' in row] == LAYERS
  routes = moejax.routes(tmp_path)
  assert list(dict.fromkeys(routes.layer)) == LAYERS
  assert {layer: int(routes.expert[routes.layer == layer].max()) < experts for layer, experts in zip(LAYERS, (4, 2, 4))} == (
      dict.fromkeys(LAYERS, True))
  report = (tmp_path / 'report/index.html').read_text()
  assert all(layer in report for layer in LAYERS)
