"""Watch the Lyapunov spectrum of a recurrent network while it trains.

Lyapunov exponents are the rates, in nats per step, at which small changes of a network's state grow (> 0) or fade (< 0)
along its input. Gradients that flow back through time grow and fade at the same rates.

The names that matter:

- :class:`LyapunovMonitor`, a Lightning callback: logs the spectrum of every recurrent layer of a model.
- :class:`InstabilityStopping`, a callback: ends a run whose gradients explode over its sequences.
- :class:`GradientFlossing`, a callback: moves the leading exponents of the layers to zero before the second step.
- :func:`lyapunov_spectrum`: the spectrum of a recurrent module or of any map, without Lightning.
- :func:`model_spectra`: those of the recurrent layers of any model, from one call of it, without a trainer.
- :func:`lyapunov_init_`: move the leading exponents of a module to zero, so that gradients neither vanish nor explode.
- :func:`jacobians`: the Jacobian of the state after each step by the state before it.
- :func:`covariant_lyapunov_vectors`: the directions that grow at the rates of the exponents.
- :func:`fixed_points`: the fixed and slow points of a step under a constant input, and their stability.
- :func:`unit_shares` and :func:`participation`: which units carry the growth.
- :func:`register_layer`: how to step a recurrent layer of your own.
- :func:`kaplan_yorke_dimension` and :func:`kolmogorov_sinai_entropy`: numbers read off a spectrum.
- :class:`LyapunovSpectrum` and :func:`lyapunov_metrics`: the same as torchmetrics, over many sequences.
- :func:`lyapunov_layout`: charts for TensorBoard's tab "Custom Scalars".
"""

from lightning_lyapunov.callbacks.flossing import GradientFlossing
from lightning_lyapunov.callbacks.monitor import LyapunovMonitor
from lightning_lyapunov.callbacks.stopping import InstabilityStopping
from lightning_lyapunov.covariant import CovariantVectors, covariant_lyapunov_vectors
from lightning_lyapunov.equilibria import FixedPoints, fixed_points
from lightning_lyapunov.functional import jacobians, lyapunov_spectrum
from lightning_lyapunov.initialisation import FlossingResult, lyapunov_init_
from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR
from lightning_lyapunov.layers.registry import register_layer
from lightning_lyapunov.measuring.models import CellSpectrum, model_spectra
from lightning_lyapunov.metrics import (
    KaplanYorkeDimension,
    KolmogorovSinaiEntropy,
    Log10GradientGain,
    LyapunovSpectrum,
    LyapunovStandardError,
    MaximalLyapunovExponent,
    MaximalLyapunovStandardError,
    MeanLyapunovExponent,
    MemorySteps,
    NumFlooredExponents,
    NumPositiveExponents,
    SequenceLength,
    ShareNearZero,
    lyapunov_metrics,
)
from lightning_lyapunov.reporting.loggers import lyapunov_layout
from lightning_lyapunov.units import participation, unit_shares

__version__ = "0.1.0"

__all__ = [
    "EXPONENT_FLOOR",
    "CellSpectrum",
    "CovariantVectors",
    "FixedPoints",
    "FlossingResult",
    "GradientFlossing",
    "InstabilityStopping",
    "KaplanYorkeDimension",
    "KolmogorovSinaiEntropy",
    "Log10GradientGain",
    "LyapunovMonitor",
    "LyapunovSpectrum",
    "LyapunovStandardError",
    "MaximalLyapunovExponent",
    "MaximalLyapunovStandardError",
    "MeanLyapunovExponent",
    "MemorySteps",
    "NumFlooredExponents",
    "NumPositiveExponents",
    "SequenceLength",
    "ShareNearZero",
    "__version__",
    "covariant_lyapunov_vectors",
    "fixed_points",
    "jacobians",
    "kaplan_yorke_dimension",
    "kolmogorov_sinai_entropy",
    "lyapunov_init_",
    "lyapunov_layout",
    "lyapunov_metrics",
    "lyapunov_spectrum",
    "model_spectra",
    "participation",
    "register_layer",
    "unit_shares",
]
