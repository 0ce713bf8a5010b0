"""What a cap on experts a token costs (Expert Choice, section 4.5)."""
from experiments.paper_effects._tiny_images import TINY_IMAGES
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Expert Choice (capped)',
    claim='At most 2 experts for each token, with room for 2 on average, classify worse than without a cap.',
    config='configs/capped_expert_choice_digits.py', common=TINY_IMAGES,
    variants={f'cap {cap}': {'model.moe.router.select.cap': float(cap)} for cap in (2, 8)},
    metric='eval/test/loss', larger='cap 2', smaller='cap 8')
