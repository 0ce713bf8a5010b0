"""LIMoE: what becomes of the text without the entropy losses."""
import pathlib
import statistics

from experiments.paper_effects.effect import Effect
from moejax import json_lines


def text_success(workdir: pathlib.Path) -> float:
  """Share of the text's tokens that are computed: a mean over layers and the last half of training."""
  rows = json_lines.read(workdir / 'metrics.jsonl')
  values = [value for row in rows[len(rows) // 2:] for key, value in row.items() if key.endswith('/text_success')]
  return statistics.mean(values)


# 64 patches and 6 words a pair: text is a minority, as with the paper's 196 and 16.
EFFECT = Effect(
    system='LIMoE',
    claim='With entropy losses by modality, more of the text is computed than with the classic losses alone.',
    config='configs/limoe_digits.py',
    common={'training.steps': 200, 'training.log_every': 10, 'data.batch_size': 16, 'model.patch_size': 1,
            'model.num_layers': 2, 'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64,
            'model.moe.group': 1120, 'optimizer.schedule.warmup': 20},
    variants={'classic losses': {'model.moe.router.balance.local_entropy.coefficient': 0.0,
                                 'model.moe.router.balance.global_entropy.coefficient': 0.0},
              'entropy losses': {}},
    metric=text_success, larger='entropy losses', smaller='classic losses')
