"""Synthetic expert loads: seeded, [L, E] tokens per expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Load = NDArray[np.float64]


def skewed(seed: int, num_layers: int, num_experts: int, *, sigma: float = 1.0) -> Load:
    """Lognormal loads, whole numbers."""
    rng = np.random.default_rng(seed)
    return np.floor(1000 * rng.lognormal(0, sigma, (num_layers, num_experts)))


def with_hottest(seed: int, num_layers: int, num_experts: int, *, times_mean: float) -> Load:
    """Skewed loads whose hottest expert has times_mean times the mean of its layer."""
    load = skewed(seed, num_layers, num_experts, sigma=0.6)
    layers = np.arange(num_layers)
    hottest = np.random.default_rng(seed).integers(0, num_experts, num_layers)
    load[layers, hottest] = 0
    load[layers, hottest] = times_mean * load.sum(axis=1) / (num_experts - times_mean)
    return load
