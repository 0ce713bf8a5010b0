"""Models, built by name: `models.build(config.model) -> Functional`."""
# Importing a model registers it.
from moejax.models import decoder, encoder_decoder, lstm, speech, two_modalities, understanding_moe, vision
from moejax.models.counts import forward_flops, parameter_counts, parameters_by_part
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, build
