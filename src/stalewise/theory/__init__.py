"""What theory says of stale training: learning-rate bounds, stability limits, and the optimizers of the proof."""

from stalewise.theory.bounds import Condition, mean_squared_gradient_bound, proven_condition, quoted_condition
from stalewise.theory.chain import SineChain
from stalewise.theory.momentum import UnifiedMomentum
from stalewise.theory.quadratic import train_quadratic
from stalewise.theory.rates import PREDICTED, ObservedRate, StepSizes, observe_rate
from stalewise.theory.stability import closed_form_limit, spectral_radius, stability_limit

__all__ = [
    "PREDICTED",
    "Condition",
    "ObservedRate",
    "SineChain",
    "StepSizes",
    "UnifiedMomentum",
    "closed_form_limit",
    "mean_squared_gradient_bound",
    "observe_rate",
    "proven_condition",
    "quoted_condition",
    "spectral_radius",
    "stability_limit",
    "train_quadratic",
]
