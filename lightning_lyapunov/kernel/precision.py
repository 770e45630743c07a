"""The dtype in which each device computes what must not be rounded."""

import torch

__all__ = ["widest_dtype"]


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of trajectories, factorisations and sums: float64, or float32 on a device without float64.

    It costs little beside the products with the frame. A rounding error of a trajectory grows by ``exp(lambda_1 t)``.
    """
    return torch.float32 if device.type == "mps" else torch.float64
