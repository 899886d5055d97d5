"""Types of the compiled core. Arrays are C-contiguous; outputs are written in place."""

from xdeepserve.ops.types import F32, I8, I32, U8, Array

LAYOUT: str
COMPILER: str

def available_isas() -> list[str]: ...
def packed_bytes(dtype: int, groups: int, n: int, k: int) -> int: ...

_Shape = tuple[int, int, int, int]

class Weight:
    def __init__(self, data: U8, dtype: int, shape: tuple[int, ...]) -> None: ...

class Cache:
    def __init__(self, keys: Array, values: Array | None, scales: F32 | None) -> None: ...

class Batch:
    def __init__(
        self,
        query_start: I32,
        seq_lens: I32,
        block_tables: I32,
        positions: I32,
        slot_mapping: I32,
        block_size: int,
    ) -> None: ...
    @property
    def block_size(self) -> int: ...

class Frame:
    def __init__(self, input_norm: F32, ffn_norm: F32, eps: float) -> None: ...
    def set_router(
        self, weight: Weight, bias: F32 | None, gate: tuple[int, bool, bool, int, int, float]
    ) -> None: ...

class Layer: ...

def gqa_layer(
    frame: Frame,
    qkv: Weight,
    qkv_bias: F32 | None,
    output: Weight,
    output_bias: F32 | None,
    q_norm: F32 | None,
    k_norm: F32 | None,
    norm_eps: float,
    rope: F32,
    num_heads: int,
    scale: float,
) -> Layer: ...
def mla_layer(
    frame: Frame,
    latents: Weight,
    latents_bias: F32 | None,
    query: Weight | None,
    query_norm: F32 | None,
    latent_norm: F32,
    norm_eps: float,
    key_absorb: Weight,
    value_absorb: Weight,
    output: Weight,
    output_bias: F32 | None,
    rope: F32,
    scale: float,
) -> Layer: ...

class Stack:
    def __init__(self) -> None: ...
    def add_layer(
        self,
        attention: Layer,
        gate_up: Weight | None,
        down: Weight | None,
        experts_gate_up: Weight | None,
        experts_down: Weight | None,
    ) -> None: ...

class Context:
    def __init__(self, isa: str, num_threads: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def op_times(self) -> dict[str, tuple[int, int]]: ...
    def read_bandwidth(self, bytes: int, repeats: int) -> float: ...
    def gemm_peak(self, dtype: int, repeats: int) -> float: ...
    def pack(self, values: F32, dtype: int, out: U8) -> None: ...
    def unpack(self, data: U8, shape: _Shape, out: F32) -> None: ...
    def embed(self, table: Array, token_ids: I32, out: F32) -> None: ...
    def linear(self, x: F32, data: U8, shape: _Shape, bias: F32 | None, out: F32) -> None: ...
    def lm_head(self, x: F32, data: U8, shape: _Shape, ids: I32, logits: F32) -> None: ...
    def grouped_linear(self, x: F32, data: U8, shape: _Shape, out: F32) -> None: ...
    def rms_norm(self, x: F32, weight: F32, eps: float, out: F32) -> None: ...
    def add_rms_norm(
        self, residual: F32, x: F32, weight: F32, eps: float, sum: F32, out: F32
    ) -> None: ...
    def quantize_rows(self, x: F32, out: I8, scales: F32) -> None: ...
    def expert_mlp(
        self,
        x: F32,
        counts: I32,
        gate_up: U8,
        gate_up_shape: _Shape,
        down: U8,
        down_shape: _Shape,
        out: F32,
    ) -> None: ...
    def combine_topk(self, rows: F32, row_of_slot: I32, topk_weights: F32, out: F32) -> None: ...
    def rope_kv_write(
        self,
        qkv: F32,
        rope: F32,
        batch: Batch,
        kv: Cache,
        q_norm: F32 | None,
        k_norm: F32 | None,
        eps: float,
        q: F32,
    ) -> None: ...
    def rope(self, x: F32, rope: F32, positions: I32, out: F32) -> None: ...
    def mla_kv_write(self, latent: F32, k_rope: F32, batch: Batch, kv: Cache) -> None: ...
    def paged_attention(self, q: F32, batch: Batch, kv: Cache, scale: float, out: F32) -> None: ...
    def mla_attention(
        self, q_latent: F32, q_rope: F32, batch: Batch, kv: Cache, scale: float, out: F32
    ) -> None: ...
    def gate_topk(
        self,
        logits: F32,
        bias: F32 | None,
        sigmoid: bool,
        renormalize: bool,
        groups: tuple[int, int],
        scaling: float,
        ids: I32,
        weights: F32,
    ) -> None: ...
    def penalize(
        self,
        logits: F32,
        prompt: I32,
        output: I32,
        penalties: tuple[float, float, float],
        ids: I32,
        raw: F32,
    ) -> int: ...
    def sample(
        self,
        logits: F32,
        temperature: F32,
        top_k: I32,
        top_p: F32,
        min_p: F32,
        uniform: Array,
        out: I32,
    ) -> None: ...
    def top_logprobs(
        self, logits: F32, token_ids: I32, chosen: F32, top_ids: I32, top_values: F32
    ) -> None: ...
    def attention_layer(
        self,
        layer: Layer,
        residual: F32,
        ffn_output: F32 | None,
        batch: Batch,
        kv: Cache,
        sum: F32,
        hidden: F32,
        ids: I32 | None,
        weights: F32 | None,
    ) -> None: ...
    def routed_experts(
        self,
        x: F32,
        topk_ids: I32,
        topk_weights: F32,
        gate_up: Weight,
        down: Weight,
        out: F32,
    ) -> None: ...
    def decoder_layers(
        self, stack: Stack, hidden_states: F32, batch: Batch, caches: list[Cache], out: F32
    ) -> None: ...
