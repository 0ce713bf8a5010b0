"""SpeechMoE: whether routers that see the shared network make fewer errors."""
from experiments.paper_effects.effect import Effect

# Synthetic speakers who use the same sounds for other phones: see `moejax.data.synthetic_speech`.
SPEAKERS = {'data.length': 16, 'data.batch_size': 32, 'training.steps': 300,
            'model.num_layers': 2, 'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64,
            'optimizer.schedule.warmup': 20}

EFFECT = Effect(
    system='SpeechMoE',
    claim='Routers that see the shared embedding network make fewer errors than routers that see the layer alone.',
    config='configs/speech_moe_digits.py:speakers',
    common=SPEAKERS,
    variants={'shared embedding': {}, 'layer alone': {'model.moe.router.features.shared_dim': 0}},
    metric='eval/test/label_error_rate', larger='layer alone', smaller='shared embedding')
