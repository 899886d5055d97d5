"""The rope table: rotation by position, and what each scaling rule does to the frequencies."""

from __future__ import annotations

import math

import numpy as np

from xdeepserve.models.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeSpec,
    YarnScaling,
    rope_table,
    yarn_mscale,
)


def test_table_holds_cosines_then_sines() -> None:
    table = rope_table(RopeSpec(10000.0, 8), 50)
    assert table.shape == (50, 8)
    assert table.dtype == np.float32
    angles = np.arange(50)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(table[:, :4], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(table[:, 4:], np.sin(angles), atol=1e-5)


def test_rows_do_not_depend_on_the_length_of_the_table() -> None:
    spec = RopeSpec(500000.0, 64, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    np.testing.assert_array_equal(rope_table(spec, 100), rope_table(spec, 1000)[:100])


def test_linear_scaling_stretches_positions() -> None:
    plain = rope_table(RopeSpec(10000.0, 16), 25)
    scaled = rope_table(RopeSpec(10000.0, 16, LinearScaling(4.0)), 100)
    np.testing.assert_allclose(scaled[::4], plain, atol=1e-5)


def test_llama3_keeps_fast_and_divides_slow_frequencies() -> None:
    inv_freq = (500000.0 ** (-np.arange(0, 128, 2) / 128)).astype(np.float32)
    scaled = Llama3Scaling(8.0, 1.0, 4.0, 8192).scale(inv_freq, 500000.0)
    turns = 8192 * inv_freq / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns >= 4], inv_freq[turns >= 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns <= 1], inv_freq[turns <= 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert np.all((scaled < inv_freq) & (scaled > inv_freq / 8), where=between)
    assert between.any()


def test_yarn_interpolates_slow_frequencies_and_scales_the_table() -> None:
    scaling = YarnScaling(
        factor=4.0,
        original_max_positions=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        attention_factor=1.25,
    )
    inv_freq = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    scaled = scaling.scale(inv_freq, 10000.0)
    assert scaled[0] == inv_freq[0]
    np.testing.assert_allclose(scaled[-1], inv_freq[-1] / 4, rtol=1e-6)
    assert rope_table(RopeSpec(10000.0, 64, scaling), 1)[0, 0] == np.float32(1.25)


def test_yarn_mscale() -> None:
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == 0.1 * math.log(40.0) + 1.0
