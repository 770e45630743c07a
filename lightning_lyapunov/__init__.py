"""Watch the Lyapunov spectrum of a recurrent network while it trains."""

from lightning_lyapunov.callback import LyapunovMonitor
from lightning_lyapunov.dashboard import lyapunov_layout
from lightning_lyapunov.functional import jacobians, lyapunov_spectrum
from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy
from lightning_lyapunov.layers import register_layer
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
    NumDegenerateExponents,
    NumPositiveExponents,
    ShareNearZero,
    lyapunov_metrics,
)
from lightning_lyapunov.spectrum import FLOOR
from lightning_lyapunov.stopping import InstabilityStopping

__all__ = [
    "FLOOR",
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
    "NumDegenerateExponents",
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
