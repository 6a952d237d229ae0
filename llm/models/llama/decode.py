"""The decoding form of a LLaMA: its weights arranged to read prompts, and then one token per step, behind a key-value cache.

It computes what `model.py` computes, without gradients and dropout and in few operations: at one token per step the time goes
into reading weights and launching operations, not into arithmetic. Products have the dtype of the weights; the residual
stream, the norms and the rotation are fp32, as in training under autocast. On a GPU the step is a CUDA graph; on a CPU that of
one row can be compiled (`compiled_decode.py`). `llm.inference.generate` chooses tokens and ends texts.

Letters: B rows, T new positions, S cache slots, D hidden size, H heads, K key and value heads, G = H / K, E head size, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from llm.device import has_compiler
from llm.errors import InputError
from llm.layers.attention import attend, attend_cached, attention_mask
from llm.models.llama.compiled_decode import CompiledRow
from llm.models.llama.model import Layer, Llama, rope_angles

SPARE_SLOTS = 8  # beyond the context, for the compiled step, which must never see all slots
Projection = Callable[[Tensor], Tensor]  # (B, T, inputs) to (B, T, outputs)


class DecodingLayer:
    """One decoder layer; projections of the same input are joined into one."""

    def __init__(self, layer: Layer) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        self.attention_norm = layer.input_layernorm.weight.float()  # (D,) in fp32, as is the other norm
        self.feed_forward_norm = layer.post_attention_layernorm.weight.float()
        self.queries_keys_values = _projection(attention.q_proj, attention.k_proj, attention.v_proj)  # to (H + 2 K) E channels
        self.output = _projection(attention.o_proj)
        self.gate_up = _projection(feed_forward.gate_proj, feed_forward.up_proj)
        self.down = _projection(feed_forward.down_proj)


def _projection(*layers: nn.Linear) -> Projection:
    """The outputs of `layers` for one input, joined; a layer that is more than a matrix (an adapter, four bits) is called."""
    if not all(map(_is_matrix, layers)):
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weights = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if not _can_pack(weight):
        return partial(linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default  # as torch.compile does for a frozen nn.Linear
    return lambda x: product(x, packed, None, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can keep the weight in its own layout, rather than reorder it in every product or leave it to BLAS.

    Measured on 2 cores with AVX512-BF16 at hidden 512, packed over plain: 1.8 times as fast in bf16 at 1 and 8 rows, in fp32
    2.7 and 2.9 times, and 2.3 times at 2048 rows.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _is_matrix(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear  # an adapter may be a subclass


@dataclass
class KVCache:
    """Keys and values of a batch of rows. Steps change it in place, because a CUDA graph refers to tensors by address."""

    stored: Tensor  # (layers, B, 2 K, S, E): the keys, then the values
    positions: Tensor  # (B, 1): where the next token of each row goes
    filled: int = 0  # slots that some row has reached
    compiled: CompiledRow | None = None  # the compiled step, if `stored` is its cache

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        self.tokens = torch.zeros_like(self.positions)  # (B, 1): what the next step reads
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_logits: Tensor | None = None


class LlamaDecoding:
    """The `Decoding` of a LLaMA: `read` begins a batch, `step` continues it. Call under `torch.inference_mode`.

    Every row has its own positions, from 0 in its own slots of the cache, so prompts may differ in length. Reading another
    batch ends the one before. The model must not change meanwhile. Its matrices are held a second time, arranged for few rows,
    and the cache of the largest batch is kept.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.context = model.context
        self._device, self._dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self._final_norm = model.model.norm.weight.float()
        self._layers = [DecodingLayer(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._head = _projection(model.lm_head)
        self._epsilon = torch.full((1, 1, 1), model.config.norm_eps)
        self._on_cpu = self._device.type == "cpu"
        # On CPU, torch's attention of one query takes 6 times as long over a bf16 cache as over one in fp32.
        self._cache_dtype = torch.float32 if self._on_cpu else self._dtype
        # On a GPU every step runs over all slots: steps are then alike, and one graph serves all.
        self._over_all_slots = not self._on_cpu
        self._cache = torch.empty(0, 0, 0, 0, 0)  # of no batch yet
        named = model.layers.named_modules()
        self._plain = all(_is_matrix(module) for name, module in named if name.endswith("_proj"))
        self._use_graphs = self._plain and self._device.type == "cuda"
        self._compiled: CompiledRow | None = None

    def compile(self) -> None:
        """Compile the step of a batch of one row, which then takes about 0.6 of the time: in 15 s, or 4 with torch's cache.

        Does nothing on a GPU, whose steps are graphs, and with adapters. InputError without a C++ compiler. The compiled step
        rounds differently, so sampled text may differ from that of other batches.
        """
        if not self._on_cpu or not self._plain or not _is_matrix(self.model.lm_head):
            return
        if not has_compiler("cpu"):
            raise InputError("compiling: expected a C++ compiler (CXX, g++ or clang++), got none")
        self._compiled = CompiledRow(self.model, self._new_cache(1, self.context + SPARE_SLOTS).stored[:, 0])
        self.read([[0]], room=1)
        self.step([0])

    def read(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begin a batch with `prompts`; logits (B, V) after the last token of each, in fp32. Then `room` tokens fit."""
        device = self._device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)  # padding at the end is never seen
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        self._batch = self._new_cache(len(prompts), -(-(longest + room) // 8) * 8)  # aligned rows of a mask are faster on GPUs
        hidden = self._hidden(tokens.to(device), self._slots[None, :longest], fresh=True)
        self._batch.positions += lengths[:, None].to(device)
        self._batch.filled = longest
        return self._logits(hidden[self._batch.rows[:, 0], lengths.to(device) - 1])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token per row, in fp32."""
        batch = self._batch
        batch.tokens.copy_(torch.tensor(tokens)[:, None])
        batch.filled += 1
        batch.steps += 1
        if batch.compiled is not None:
            return self._compiled_step(batch.compiled, *tokens)
        if not self._use_graphs or batch.steps == 1:  # libraries initialize in the first step, outside a graph
            return self._eager_step()
        if batch.graph is None:
            batch.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(batch.graph):  # records without computing
                batch.graph_logits = self._eager_step()
        assert batch.graph_logits is not None
        batch.graph.replay()
        return batch.graph_logits.clone()

    def look_ahead(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) after each of `tokens` (B, T), which do not stay in the cache; in fp32."""
        batch = self._batch
        positions = batch.positions + torch.arange(tokens.shape[1], device=tokens.device)
        batch.filled += tokens.shape[1]
        logits = self._logits(self._hidden(tokens, positions))
        batch.filled -= tokens.shape[1]  # a row sees only the slots before its position
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row of the batch but these."""
        batch = self._batch
        chosen = torch.tensor(rows, device=batch.positions.device)
        self._batch = KVCache(batch.stored[:, chosen], batch.positions[chosen], batch.filled)

    def _new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache. Its memory is reused: what an earlier batch left gets weight 0, as zeros would."""
        config, (_, most_rows, _, most_slots, _) = self.model.config, self._cache.shape
        if rows > most_rows or slots > most_slots:
            rows_of_cache, slots_of_cache = max(rows, most_rows), max(slots, most_slots)
            shape = (config.layers, rows_of_cache, 2 * config.kv_heads, slots_of_cache, config.head_size)
            self._cache = torch.zeros(shape, dtype=self._cache_dtype, device=self._device)
            self._slots = torch.arange(slots_of_cache, device=self._device)
            cosine, sine = (table[0, 0] for table in rope_angles(config, self._slots[None]))  # (S, E / 2)
            self._angles = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
        positions = torch.zeros(rows, 1, dtype=torch.int64, device=self._device)
        if rows == 1 and self._compiled is not None:
            return KVCache(self._compiled.cache[:, None], positions, compiled=self._compiled)
        return KVCache(self._cache[:, :rows, :, :slots], positions)

    def _eager_step(self) -> Tensor:
        logits = self._logits(self._hidden(self._batch.tokens, self._batch.positions)[:, -1])
        self._batch.positions += 1
        return logits

    def _compiled_step(self, row: CompiledRow, token: int) -> Tensor:
        batch = self._batch
        position = batch.positions[0]
        cosine, sine = (table[position] for table in self._angles)
        logits = row.logits(token, self._slots[: batch.filled], position, cosine, sine)
        batch.positions += 1
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        normal = self._rms_norm(hidden.reshape(-1, 1, hidden.shape[-1]), self._final_norm)
        return self._head(normal).float().view(*hidden.shape[:-1], -1)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x (N, 1, D), in the dtype of the products."""
        if not self._on_cpu:
            return torch.rms_norm(x, weight.shape, weight, self.model.config.norm_eps).to(self._dtype)
        # On CPU torch needs ten operations; here the mean square is one, the product of each position with itself.
        scale = torch.baddbmm(self._epsilon, x, x.mT, alpha=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight).to(self._dtype)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B or 1, T, H + 2 K, E) at `positions`. Values get angle 0: one operation then serves all heads."""
        config = self.model.config
        rotated, values = config.heads + config.kv_heads, config.kv_heads
        cosine, sine = (table[positions][:, :, None].expand(-1, -1, rotated, -1) for table in self._angles)
        return pad(cosine, (0, 0, 0, values), value=1.0), pad(sine, (0, 0, 0, values))

    def _hidden(self, tokens: Tensor, positions: Tensor, *, fresh: bool = False) -> Tensor:
        """The residual stream (B, T, D) after all layers, in fp32, for tokens (B, T) at `positions` (B or 1, T).

        Stores their keys and values there. Each position sees what its row has stored up to it; if `fresh`, only these tokens.
        """
        batch, config = self._batch, self.model.config
        heads, kv_heads, half = config.heads, config.kv_heads, config.head_size // 2
        shape = (*tokens.shape, heads + 2 * kv_heads, config.head_size)
        flat = (tokens.numel(), 1, heads * config.head_size)
        cosine, sine = self._rotation(positions)
        seen = self._slots[: batch.stored.shape[3] if self._over_all_slots else batch.filled]
        if fresh:
            mask = attention_mask(tokens.shape[1], documents=None, dtype=self._dtype, device=self._device)
        else:
            late = (seen > positions[:, None, :, None]).repeat(1, 1, heads // kv_heads, 1)  # (B, 1, G T, S)
            bias = torch.zeros_like(late, dtype=self._cache_dtype).masked_fill_(late, -torch.inf)
        reached = batch.stored[:, :, :, : len(seen)]
        caches = zip(
            batch.stored.unbind(0), reached[:, :, :kv_heads].unbind(0), reached[:, :, kv_heads:].unbind(0), strict=True
        )
        x: Tensor = self.model.model.embed_tokens(tokens.reshape(-1, 1)).float()  # (B T, 1, D)
        for layer, (stored, keys, values) in zip(self._layers, caches, strict=True):
            joined = layer.queries_keys_values(self._rms_norm(x, layer.attention_norm)).view(shape).float()
            # Each channel is rotated with that half a head away (Transformers' `rotate_half`); the sine has the signs.
            joined = torch.addcmul(joined * cosine, joined.roll(half, -1), sine).to(self._cache_dtype)
            q, new = torch.split_with_sizes(joined, (heads, 2 * kv_heads), 2)  # (B, T, H, E), (B, T, 2 K, E)
            stored[batch.rows, :, positions] = new
            q = q.transpose(1, 2)
            if fresh:
                q, k, v = (part.to(self._dtype) for part in (q, *new.transpose(1, 2).chunk(2, 1)))
                mixed = attend(q, k, v, mask=mask)
            else:
                mixed = attend_cached(q, keys, values, bias=bias)
            x = x + layer.output(mixed.transpose(1, 2).reshape(flat).to(self._dtype))
            gate, up = layer.gate_up(self._rms_norm(x, layer.feed_forward_norm)).chunk(2, -1)
            x = x + layer.down(silu(gate).mul_(up))
        return x.view(*tokens.shape, -1)


build = LlamaDecoding  # the registry's entry
