"""The MTP layer against section 2.2 of the DeepSeek-V3 paper, written out in float64.

transformers has no implementation to compare with: it drops the layer's tensors when it loads.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.toys import toy_model, write_toy
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.loader import load_model
from xdeepserve.models.mtp import MtpUnit
from xdeepserve.models.rope import rope_table
from xdeepserve.models.spec import MlaSpec, ModelSpec
from xdeepserve.ops import AttentionBatch, WeightDtype, get_ops
from xdeepserve.testing.toy_models import ToyCheckpoint, toy_checkpoint

F64 = npt.NDArray[np.float64]
TOY, LAYER = "deepseek_v3_mtp", 3
IDS = [(7 * i * i + 3 * i + 5) % 320 for i in range(41)]
HIDDEN = np.random.default_rng(0).standard_normal((len(IDS), 64)).astype(np.float32)
BLOCK_SIZE = 8


class PaperMtp:
    """h' = M [RMSNorm(h(i)); RMSNorm(Emb(t(i+1)))], one decoder layer, the shared head.

    The published checkpoint stores M with its halves the other way round.
    """

    def __init__(self, checkpoint: ToyCheckpoint, spec: ModelSpec) -> None:
        assert isinstance(spec.attention, MlaSpec)
        assert spec.moe is not None
        self.checkpoint, self.spec, self.mla, self.moe = checkpoint, spec, spec.attention, spec.moe
        self.eps = spec.norm_eps

    def weight(self, name: str) -> F64:
        return self.checkpoint.tensor(name).astype(np.float64)

    def part(self, name: str) -> F64:
        return self.weight(f"model.layers.{LAYER}.{name}.weight")

    def norm(self, x: F64, weight: F64, eps: float | None = None) -> F64:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + (self.eps if eps is None else eps))
        normed: F64 = x / scale * weight
        return normed

    def logits(self, hidden: F64, next_ids: list[int]) -> tuple[F64, F64]:
        """Logits and states of all rows; row i knows hidden i and the id behind it."""
        embedded = self.weight("model.embed_tokens.weight")[next_ids]
        joined = [self.norm(embedded, self.part("enorm")), self.norm(hidden, self.part("hnorm"))]
        x = np.concatenate(joined, axis=1) @ self.part("eh_proj").T
        x = x + self.attention(self.norm(x, self.part("input_layernorm")))
        x = x + self.experts(self.norm(x, self.part("post_attention_layernorm")))
        head = self.norm(x, self.part("shared_head.norm"))
        return head @ self.weight("lm_head.weight").T, x

    def attention(self, x: F64) -> F64:
        mla, num = self.mla, len(x)
        attn = partial(self._attn)
        q = self.norm(x @ attn("q_a_proj").T, attn("q_a_layernorm"), 1e-6) @ attn("q_b_proj").T
        q = q.reshape(num, mla.num_heads, -1)
        down = x @ attn("kv_a_proj_with_mqa").T
        latent = self.norm(down[:, : mla.kv_lora_rank], attn("kv_a_layernorm"), 1e-6)
        kv = (latent @ attn("kv_b_proj").T).reshape(num, mla.num_heads, -1)
        nope = mla.qk_nope_head_dim
        k_rope = self.rotate(down[:, None, mla.kv_lora_rank :])
        scores = np.einsum("ihd,jhd->hij", q[..., :nope], kv[..., :nope])
        scores += np.einsum("ihd,jd->hij", self.rotate(q[..., nope:]), k_rope[:, 0])
        scores = scores * mla.scale + np.where(np.tri(num, dtype=bool), 0.0, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", weights, kv[..., nope:]).reshape(num, -1)
        projected: F64 = out @ attn("o_proj").T
        return projected

    def _attn(self, name: str) -> F64:
        return self.part(f"self_attn.{name}")

    def rotate(self, x: F64) -> F64:
        """Pairs (even, odd) are rotated; the result stays in pairs."""
        table = rope_table(self.mla.rope, len(x)).astype(np.float64)
        half = x.shape[-1] // 2
        cos, sin = table[:, None, :half], table[:, None, half:]
        even, odd = x[..., ::2], x[..., 1::2]
        rotated: F64 = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return rotated.reshape(x.shape)

    def experts(self, x: F64) -> F64:
        gate = self.moe.gate
        scores = 1 / (1 + np.exp(-x @ self.part("mlp.gate").T))
        bias = self.weight(f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias")
        out = self.mlp(x, "mlp.shared_experts")
        for row, score in enumerate(scores):
            groups = (score + bias).reshape(gate.num_groups, -1)
            best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: gate.topk_groups]
            allowed = np.isin(np.arange(gate.num_groups), best).repeat(groups.shape[1])
            chosen = np.argsort(-np.where(allowed, score + bias, -np.inf))[: gate.top_k]
            shares = score[chosen] / score[chosen].sum() * gate.scaling
            for expert, share in zip(chosen, shares, strict=True):
                out[row] += share * self.mlp(x[row], f"mlp.experts.{expert}")
        return out

    def mlp(self, x: F64, name: str) -> F64:
        gate, up = x @ self.part(f"{name}.gate_proj").T, x @ self.part(f"{name}.up_proj").T
        out: F64 = (gate / (1 + np.exp(-gate)) * up) @ self.part(f"{name}.down_proj").T
        return out


def batch_of(first: int, ids: list[int]) -> ForwardBatch:
    """One sequence in blocks 0, 1, ... computed from position `first` on."""
    positions = np.arange(first, first + len(ids), dtype=np.int32)
    stop = first + len(ids)
    table = np.arange(-(-stop // BLOCK_SIZE), dtype=np.int32)[None]
    return ForwardBatch(
        token_ids=np.array(ids, np.int32),
        attention=AttentionBatch(
            query_start=np.array([0, len(ids)], np.int32),
            seq_lens=np.array([stop], np.int32),
            block_tables=table,
            positions=positions,
            slot_mapping=positions,
        ),
        logits_rows=np.arange(len(ids), dtype=np.int32),
    )


def unit_of(backend: str) -> tuple[MtpUnit, Any]:
    model = toy_model(TOY, "float32", backend)
    assert model.mtp is not None
    return model.mtp, model.kv_format.new_layer(8, BLOCK_SIZE)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_layer_is_the_paper_s(backend: str) -> None:
    unit, kv = unit_of(backend)
    paper = PaperMtp(toy_checkpoint(TOY), toy_model(TOY).spec)
    states = unit(HIDDEN, batch_of(0, IDS), kv)
    logits = unit.head(states, np.arange(len(IDS), dtype=np.int32))
    expected, expected_states = paper.logits(HIDDEN.astype(np.float64), IDS)
    np.testing.assert_allclose(states, expected_states, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=5e-4)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunks_of_the_layer_equal_the_whole(backend: str) -> None:
    unit, kv = unit_of(backend)
    whole = unit(HIDDEN, batch_of(0, IDS), kv)
    _, kv = unit_of(backend)
    cuts = [0, 1, 8, 23, 40, 41]
    parts = [unit(HIDDEN[a:b], batch_of(a, IDS[a:b]), kv) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_main_model_is_what_it_is_without_the_layer() -> None:
    assert toy_model("deepseek_v3").mtp is None
    plain, with_mtp = toy_model("deepseek_v3").spec, toy_model(TOY).spec
    assert (plain.has_mtp, with_mtp.has_mtp) == (False, True)
    assert plain.num_layers == with_mtp.num_layers == LAYER


def test_the_layer_is_packed_and_mapped_if_the_checkpoint_carries_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ops = get_ops("cpu")
    write_toy(tmp_path / "whole", toy_checkpoint(TOY))
    # Converted checkpoints keep the config and leave the layer out.
    bare = toy_checkpoint("deepseek_v3", num_nextn_predict_layers=1)
    bare.shapes = toy_checkpoint("deepseek_v3").shapes
    write_toy(tmp_path / "bare", bare)
    for name, has_mtp in (("whole", True), ("bare", False)):
        for _ in ("packed now", "mapped"):
            model = load_model(
                tmp_path / name, dtype=WeightDtype.BF16, ops=ops, cache_dir=tmp_path / "cache"
            )
            assert (model.mtp is not None) == has_mtp
    assert "not used by this architecture" not in caplog.text
