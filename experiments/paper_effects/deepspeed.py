"""Random Token Selection spreads what is dropped over a sequence (DeepSpeed-MoE, section 3)."""
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='DeepSpeed-MoE',
    claim='At half the capacity, dropping by position drops the last quarter of a sequence more often than the first; '
          'random token selection does not.',
    program='experiments.paper_effects.programs.deepspeed_drops',
    variants={'by position': {}, 'random': {}},
    metric='last_minus_first', larger='by position', smaller='random', at_least=3.)
