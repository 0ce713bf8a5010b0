"""What `moejax` exports: `__init__.py` reads this list when a name is asked for. `X as X` is how a stub exports X."""
from moejax import describe as describe
from moejax import evaluate as evaluate
from moejax import models as models
from moejax import train as train
from moejax.analysis.route_table import routes as routes
from moejax.config import ConfigError as ConfigError
from moejax.config_files import load as load
from moejax.functional import Functional as Functional
from moejax.functional import functionalize as functionalize
from moejax.layers.feed_forwards.moe import MoE as MoE
from moejax.models.output import ModelOutput as ModelOutput
from moejax.random import derive as derive
from moejax.routing import papers as papers
from moejax.routing import router as router
from moejax.routing.inputs import RouterInputs as RouterInputs
from moejax.routing.plans import DensePlan as DensePlan
from moejax.routing.plans import SlotPlan as SlotPlan
from moejax.routing.plans import SoftPlan as SoftPlan
from moejax.routing.plans import TokenPlan as TokenPlan
from moejax.routing.router import Router as Router
from moejax.routing.router import RouterOutput as RouterOutput
from moejax.training.durability.restore import restore_for_evaluation as restore_for_evaluation
from moejax.training.setup import Setup as Setup
from moejax.training.setup import default_config as default_config
from moejax.training.setup import prepare as prepare

__version__: str
