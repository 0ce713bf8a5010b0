"""SpeechMoE: whether routers that see the shared network make fewer errors, and what the sparsity loss does to them."""
from experiments.paper_effects.effect import Effect

# Synthetic speakers who use the same sounds for different phones: see `moejax.data.synthetic_speech`.
COMMON = dict(
    system='SpeechMoE',
    config='configs/speech_moe_digits.py:speakers',
    common={'data.length': 16, 'data.batch_size': 32, 'training.steps': 300, 'model.num_layers': 2, 'model.dim': 32,
            'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64, 'optimizer.schedule.warmup': 20})
EFFECT = Effect(
    claim='Routers that see the shared embedding network make fewer errors than routers that see the layer alone.',
    variants={'all': {}, 'layer alone': {'model.moe.router.features.shared_dim': 0}},
    metric='eval/test/label_error_rate', larger='layer alone', smaller='all', **COMMON)
EFFECTS = dict(sparsity=Effect(
    claim='The sparsity loss makes the router more certain: the mean of its largest probability rises.',
    variants={'all': {}, 'no sparsity loss': {'model.moe.router.balance.sparsity': 0.0}},
    metric='router/block_01/confidence', larger='all', smaller='no sparsity loss', **COMMON))
