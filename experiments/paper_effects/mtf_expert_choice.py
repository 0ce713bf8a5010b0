"""The loss that Mesh TensorFlow adds to Expert Choice."""
from experiments.paper_effects._tiny_images import TINY_IMAGES
from experiments.paper_effects.effect import Effect

EFFECT = Effect(
    system='Expert Choice (Mesh TensorFlow)',
    claim='Without the loss that evens out what tokens get, more tokens are taken by no expert.',
    config='configs/mtf_expert_choice_digits.py', common=TINY_IMAGES,
    variants={'no loss': {'model.moe.router.balance.tokens': 0.}, 'loss 0.01': {}},
    metric='router/block_01/dropped', larger='no loss', smaller='loss 0.01')
