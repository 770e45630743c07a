"""Watch the Lyapunov spectrum of a recurrent network while it trains."""

from lightning_lyapunov.callbacks.monitor import LyapunovMonitor
from lightning_lyapunov.callbacks.stopping import InstabilityStopping
from lightning_lyapunov.functional import jacobians, lyapunov_spectrum
from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR
from lightning_lyapunov.layers.registry import register_layer
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
    ShareNearZero,
    lyapunov_metrics,
)
from lightning_lyapunov.reporting.loggers import lyapunov_layout

__all__ = [
    "EXPONENT_FLOOR",
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
    "ShareNearZero",
    "jacobians",
    "kaplan_yorke_dimension",
    "kolmogorov_sinai_entropy",
    "lyapunov_layout",
    "lyapunov_metrics",
    "lyapunov_spectrum",
    "register_layer",
]
