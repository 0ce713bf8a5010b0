"""SpeechMoE: what the sparsity loss does to the router."""
from experiments.paper_effects.effect import Effect
from experiments.paper_effects.speech_moe import SPEAKERS

EFFECT = Effect(
    system='SpeechMoE',
    claim='The sparsity loss makes the router more certain: the mean of its largest probability rises.',
    config='configs/speech_moe_digits.py:speakers',
    common=SPEAKERS,
    variants={'importance alone': {'model.moe.router.balance.sparsity': 0.0}, 'with sparsity': {}},
    metric='router/block_01/confidence', larger='with sparsity', smaller='importance alone')
