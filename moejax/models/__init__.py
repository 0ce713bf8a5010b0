"""Models, built by name: `models.build(config.model) -> Functional`."""
# Importing a model registers it.
from moejax.models import clusters, decoder, encoder_decoder, recurrent, speech, two_modalities, vision
from moejax.models.counts import forward_flops, parameter_counts, parameters_by_part
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, build
