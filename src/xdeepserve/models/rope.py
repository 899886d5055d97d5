"""Rotary position embeddings: frequencies of each scaling rule and the cos/sin table.

The table is what operators read: row p holds the cosines of the rotary_dim / 2 frequencies at
position p, then the sines, both times the rule's attention factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.ops import F32

MAX_POSITIONS = 1 << 22
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def scale(self, inv_freq: F32, theta: float) -> F32:
        return inv_freq / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor: float = 1.0

    def scale(self, inv_freq: F32, theta: float) -> F32:
        turns = self.original_max_positions * inv_freq / np.float32(2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        scaled: F32 = ((1.0 - keep) * inv_freq / self.factor + keep * inv_freq).astype(np.float32)
        return scaled


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): interpolated below beta_slow turns, kept above beta_fast."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float

    def scale(self, inv_freq: F32, theta: float) -> F32:
        half = inv_freq.size
        low, high = self._ramp_bounds(2 * half, theta)
        ramp = np.clip((np.arange(half, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
        scaled: F32 = (inv_freq / self.factor * ramp + inv_freq * (1.0 - ramp)).astype(np.float32)
        return scaled

    def _ramp_bounds(self, dim: int, theta: float) -> tuple[float, float]:
        def dim_of(turns: float) -> float:
            ratio = self.original_max_positions / (turns * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(theta))

        low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0.0), min(high, dim - 1.0)
        return low, high if high != low else low + 0.001


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Which entries of a head rotate, how fast, and the scaling rule if there is one."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


def rope_table(spec: RopeSpec, max_positions: int) -> F32:
    """[max_positions, rotary_dim] float32: cosines, then sines.

    Angles are rounded to float32 before the cosine, as `transformers` computes them; the cosine
    itself is taken in float64, so that the table does not depend on the math library.
    """
    exponent = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    inv_freq: F32 = (1.0 / np.power(np.float32(spec.theta), exponent)).astype(np.float32)
    factor = 1.0
    if spec.scaling is not None:
        inv_freq = spec.scaling.scale(inv_freq, spec.theta)
        factor = spec.scaling.attention_factor
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * inv_freq[None, :]
    table = np.empty((max_positions, spec.rotary_dim), np.float32)
    half = spec.rotary_dim // 2
    table[:, :half] = np.cos(angles, dtype=np.float64) * factor
    table[:, half:] = np.sin(angles, dtype=np.float64) * factor
    return table


def rope_fields(config: ConfigFields, *, default_theta: float = 10_000.0) -> ConfigFields:
    """The rope fields in one object, from either style of config.json.

    transformers 5 writes `rope_parameters`; transformers 4 wrote `rope_theta` and
    `partial_rotary_factor` at the top and the rest under `rope_scaling`.
    """
    nested = config.child("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    return nested.merged(
        rope_type=nested.get("type") or "default",
        rope_theta=config.get("rope_theta") or default_theta,
        partial_rotary_factor=config.get("partial_rotary_factor"),
        original_max_position_embeddings=config.get("original_max_position_embeddings")
        or config.get("max_position_embeddings"),
    )


def parse_rope(fields: ConfigFields, head_dim: int, *, partial: float = 1.0) -> RopeSpec:
    """RopeSpec for heads of `head_dim`; `partial` is the family's default rotary share.

    Raises:
        ModelFormatError: unsupported rope type, or a field missing or out of range.
    """
    share = fields.number("partial_rotary_factor", partial, high=1.0)
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "partial_rotary_factor", f"gives rotary_dim={rotary_dim} of head_dim={head_dim}; "
            "it must be even and at least 2",
        )  # fmt: skip
    theta = fields.number("rope_theta", low=1.0)
    return RopeSpec(theta, rotary_dim, _parse_scaling(fields))


def _parse_scaling(fields: ConfigFields) -> RopeScaling | None:
    rope_type = fields.choice("rope_type", _ROPE_TYPES)
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearScaling(fields.number("factor", high=1e6))
    original = fields.integer("original_max_position_embeddings", high=MAX_POSITIONS)
    if rope_type == "llama3":
        return _parse_llama3(fields, original)
    return _parse_yarn(fields, original)


def _parse_llama3(fields: ConfigFields, original: int) -> Llama3Scaling:
    low = fields.number("low_freq_factor", high=1e6)
    high = fields.number("high_freq_factor", high=1e6)
    if high <= low:
        raise fields.error("high_freq_factor", f"must be above low_freq_factor={low}")
    return Llama3Scaling(fields.number("factor", high=1e6), low, high, original)


def _parse_yarn(fields: ConfigFields, original: int) -> YarnScaling:
    factor = fields.number("factor", high=1e6)
    mscale = fields.number("mscale", 0.0, low=-1e-9, high=100.0)
    mscale_all_dim = fields.number("mscale_all_dim", 0.0, low=-1e-9, high=100.0)
    attention_factor = yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=fields.number("beta_fast", 32.0, high=1e6),
        beta_slow=fields.number("beta_slow", 1.0, high=1e6),
        truncate=fields.boolean("truncate", True),
        attention_factor=fields.number("attention_factor", attention_factor, high=100.0),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature correction for a context stretched by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
