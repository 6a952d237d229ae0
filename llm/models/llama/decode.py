"""The decoding form of a LLaMA: its weights arranged to read prompts, and then one token per step, behind a key-value cache.

It computes what `model.py` computes, without gradients and dropout and in few operations: at one token per step the time goes
into reading weights and launching operations, not into arithmetic. Products have the dtype of the weights; the residual
stream, the norms and the rotation are fp32, as in training under autocast. On a GPU the step is a CUDA graph; on a CPU that of
one row can be compiled (`compiled_decode.py`). `llm.inference.generate` chooses tokens and ends texts.

Letters: B rows, T new positions, S cache slots, D hidden size, H heads, K key and value heads, G = H / K, E head size, V
vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from llm.device import has_compiler
from llm.errors import InputError
from llm.layers.attention import attend, attend_cached, attention_mask
from llm.layers.log_probabilities import log_probabilities
from llm.models.llama.compiled_decode import CompiledRow
from llm.models.llama.model import Layer, Llama, rope_angles

SPARE_SLOTS = 8  # beyond the context, for the compiled step, which must never see all slots
ALIGNMENT = 8  # slots of a cache are a multiple: aligned rows of a mask are faster on GPUs
READ_TOKENS = 4096  # positions of prompts that are read together, padding included; their activations are in memory at once
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
    and the memory of the largest cache is kept.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.context = model.context
        self.device, self._dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.vocab_size = model.vocab_size
        self._final_norm = model.model.norm.weight.float()
        self._layers = [DecodingLayer(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._head = _projection(model.lm_head)
        self._epsilon = torch.full((1, 1, 1), model.config.norm_eps)
        self._on_cpu = self.device.type == "cpu"
        # On CPU, torch's attention of one query takes 6 times as long over a bf16 cache as over one in fp32.
        self._cache_dtype = torch.float32 if self._on_cpu else self._dtype
        # On a GPU every step runs over all slots: steps are then alike, and one graph serves all.
        self._over_all_slots = not self._on_cpu
        self._slots = torch.empty(0, dtype=torch.int64)
        self.release()
        named = model.layers.named_modules()
        self._plain = all(_is_matrix(module) for name, module in named if name.endswith("_proj"))
        self._use_graphs = self._plain and self.device.type == "cuda"
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

    @property
    def bytes_per_position(self) -> int:
        """Bytes of the cache for one position of one row."""
        config = self.model.config
        return config.layers * 2 * config.kv_heads * config.head_size * self._cache_dtype.itemsize

    def read(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begin a batch with `prompts`; logits (B, V) after the last token of each, in fp32. Then `room` tokens fit."""
        longest = max(map(len, prompts))
        batch = self._batch = self._new_cache(len(prompts), -(-(longest + room) // ALIGNMENT) * ALIGNMENT)
        last = []
        for start, stop in _read_together([len(prompt) for prompt in prompts]):
            lengths = torch.tensor([len(prompt) for prompt in prompts[start:stop]])
            tokens = torch.zeros(stop - start, int(lengths.max()), dtype=torch.int64)  # padding at the end is never seen
            for row, prompt in enumerate(prompts[start:stop]):
                tokens[row, : len(prompt)] = torch.tensor(prompt)
            slots = self._slots[None, : tokens.shape[1]]
            hidden = self._hidden(tokens.to(self.device), slots, stored=batch.stored[:, start:stop])
            lengths = lengths.to(self.device)
            last.append(hidden[batch.rows[: stop - start, 0], lengths - 1])
            batch.positions[start:stop] = lengths[:, None]
        batch.filled = longest
        return self._logits(torch.cat(last))

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

    def look_ahead(self, tokens: Tensor, targets: Tensor, branches: Tensor) -> Tensor:
        """log P (B, T), in fp64, of each of `targets` after the one of `tokens` beside it; they do not stay in the cache.

        Positions with the same number in `branches` follow each other: they continue what their row has read, and see no other
        branch. All three are (B, T).
        """
        batch, count = self._batch, tokens.shape[1]
        places = torch.arange(count, device=tokens.device)
        begins = torch.ones_like(branches, dtype=torch.bool)
        begins[:, 1:] = branches[:, 1:] != branches[:, :-1]
        offsets = places - torch.where(begins, places, 0).cummax(1).values  # (B, T): within each one's branch
        slots = (batch.filled + places)[None]
        # Of the prompt a row sees its own slots, and of the new ones those of its branch up to each position.
        hidden_slots = self._slots[: batch.filled] >= batch.positions[:, None]  # (B, 1, S)
        late = places > places[:, None]
        others = (branches[:, None, :] != branches[:, :, None]) | late  # (B, T, T)
        unseen = torch.cat([hidden_slots.expand(-1, count, -1), others], -1)[:, None]
        stored = batch.stored[:, :, :, : batch.filled + count]
        hidden = self._hidden(tokens, batch.positions + offsets, stored=stored, slots=slots, unseen=unseen)
        found = log_probabilities(self._logits, hidden.flatten(0, 1), targets.flatten(), vocab_size=self.vocab_size)
        return found.view(tokens.shape)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row of the batch but these."""
        batch = self._batch
        chosen = torch.tensor(rows, device=batch.positions.device)
        self._batch = KVCache(batch.stored[:, chosen], batch.positions[chosen], batch.filled)

    def release(self) -> None:
        """End the batch and give back the memory of its cache."""
        self._cache = torch.empty(0)  # the memory of all caches, one after the other
        self._batch = KVCache(self._cache, torch.zeros(0, 1, dtype=torch.int64, device=self.device))

    def _new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache. Its memory is reused: what an earlier batch left gets weight 0, as zeros would."""
        config = self.model.config
        if slots > len(self._slots):
            self._slots = torch.arange(slots, device=self.device)
            cosine, sine = (table[0, 0] for table in rope_angles(config, self._slots[None]))  # (S, E / 2)
            self._angles = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
        positions = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        if rows == 1 and self._compiled is not None and slots <= self._compiled.cache.shape[2]:
            return KVCache(self._compiled.cache[:, None], positions, compiled=self._compiled)
        shape = (config.layers, rows, 2 * config.kv_heads, slots, config.head_size)
        if math.prod(shape) > len(self._cache):
            self.release()
            self._cache = torch.zeros(math.prod(shape), dtype=self._cache_dtype, device=self.device)
        return KVCache(self._cache[: math.prod(shape)].view(shape), positions)

    def _eager_step(self) -> Tensor:
        batch = self._batch
        stored = batch.stored if self._over_all_slots else batch.stored[:, :, :, : batch.filled]
        unseen = (self._slots[: stored.shape[3]] > batch.positions)[:, None, None]
        logits = self._logits(self._hidden(batch.tokens, batch.positions, stored=stored, unseen=unseen)[:, -1])
        batch.positions += 1
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

    def _hidden(
        self, tokens: Tensor, positions: Tensor, *, stored: Tensor, slots: Tensor | None = None, unseen: Tensor | None = None
    ) -> Tensor:
        """The residual stream (B, T, D) after all layers, in fp32, for tokens (B, T) at `positions` (B or 1, T).

        Their keys and values go to `slots` (1, T), by default those of their positions, of `stored` (layers, B, 2 K, S, E).
        Each sees the slots where `unseen` (B, 1, T, S) is false; without it, these tokens up to itself.
        """
        config = self.model.config
        heads, kv_heads, half = config.heads, config.kv_heads, config.head_size // 2
        shape = (*tokens.shape, heads + 2 * kv_heads, config.head_size)
        flat = (tokens.numel(), 1, heads * config.head_size)
        cosine, sine = self._rotation(positions)
        places, rows = positions if slots is None else slots, self._batch.rows[: len(tokens)]
        if unseen is None:
            mask = attention_mask(tokens.shape[1], documents=None, device=self.device)
        else:
            late = unseen.repeat(1, 1, heads // kv_heads, 1)  # (B, 1, G T, S)
            bias = torch.zeros_like(late, dtype=self._cache_dtype).masked_fill_(late, -torch.inf)
        caches = zip(stored.unbind(0), stored[:, :, :kv_heads].unbind(0), stored[:, :, kv_heads:].unbind(0), strict=True)
        x: Tensor = self.model.model.embed_tokens(tokens.reshape(-1, 1)).float()  # (B T, 1, D)
        for layer, (cache, keys, values) in zip(self._layers, caches, strict=True):
            joined = layer.queries_keys_values(self._rms_norm(x, layer.attention_norm)).view(shape).float()
            # Each channel is rotated with that half a head away (Transformers' `rotate_half`); the sine has the signs.
            joined = torch.addcmul(joined * cosine, joined.roll(half, -1), sine).to(self._cache_dtype)
            q, new = torch.split_with_sizes(joined, (heads, 2 * kv_heads), 2)  # (B, T, H, E), (B, T, 2 K, E)
            cache[rows, :, places] = new
            q = q.transpose(1, 2)
            if unseen is None:
                q, k, v = (part.to(self._dtype) for part in (q, *new.transpose(1, 2).chunk(2, 1)))
                mixed = attend(q, k, v, mask=mask)
            else:
                mixed = attend_cached(q, keys, values, bias=bias)
            x = x + layer.output(mixed.transpose(1, 2).reshape(flat).to(self._dtype))
            gate, up = layer.gate_up(self._rms_norm(x, layer.feed_forward_norm)).chunk(2, -1)
            x = x + layer.down(silu(gate).mul_(up))
        return x.view(*tokens.shape, -1)


def _read_together(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of prompts that are read together: READ_TOKENS with padding, or one prompt."""
    start = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > start and longest * (index + 1 - start) > READ_TOKENS:
            yield start, index
            start, longest = index, length
    yield start, len(lengths)


build = LlamaDecoding  # the registry's entry
