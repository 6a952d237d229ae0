"""The decoding form of a decoder: its weights arranged to read prompts, and then one token per step, behind a key-value cache.

It computes what `model.py` computes, without gradients and dropout and in few operations: at one token per step the time goes
into reading weights and launching operations, not into arithmetic. Products have the dtype of the weights, where the machine
is fast in it; the residual stream, the norms and the rotation are fp32, as in training under autocast. On a GPU the step is a
CUDA graph; on a CPU that of a few rows can be one kernel (`row_step.py`). `llm.inference.generate` chooses tokens and ends
texts.

Letters: B rows, T new positions, S cache slots, D hidden size, H heads, K key and value heads, G = H / K, E head size, V
vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from llm.errors import InputError
from llm.layers.attention import attend, attend_cached, attention_mask
from llm.layers.cpp_kernel import UnavailableError
from llm.layers.log_probabilities import log_probabilities
from llm.layers.ops import activate, capped
from llm.models.decoder.decoding_layer import DecodingLayer, is_matrix, product_dtype, projection
from llm.models.decoder.model import Decoder
from llm.models.decoder.rope import Waves, rope_angles
from llm.models.decoder.row_step import MOST_ROWS, RowStep
from llm.models.options import Kind, LongRope

ALIGNMENT = 8  # slots of a cache are a multiple: aligned rows of a mask are faster on GPUs
READ_TOKENS = 4096  # positions of prompts that are read together, padding included; their activations are in memory at once


@dataclass
class KVCache:
    """Keys and values of a batch of rows. Steps change it in place, because a CUDA graph refers to tensors by address."""

    stored: Tensor  # (layers, B, 2 K, S, E): the keys, then the values
    positions: Tensor  # (B, 1): where the next token of each row goes
    filled: int = 0  # slots that some row has reached

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        self.tokens = torch.zeros_like(self.positions)  # (B, 1): what the next step reads
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_logits: Tensor | None = None


class DecoderDecoding:
    """The `Decoding` of a decoder: `read` begins a batch, `step` continues it. Call under `torch.inference_mode`.

    Every row has its own positions, from 0 in its own slots of the cache, so prompts may differ in length. Reading another
    batch ends the one before. The model must not change meanwhile. Its matrices are held a second time, arranged for few rows,
    and the memory of the largest cache is kept.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.context = model.context
        self.device = model.lm_head.weight.device
        self._dtype = product_dtype(model.lm_head.weight)
        self.vocab_size = model.vocab_size
        self._final_norm = model.model.norm.scale.float()
        layers = zip(model.layers, model.kinds, strict=True)
        self._layers = [DecodingLayer(layer, kind, model.config) for layer, kind in layers]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._head = projection(model.lm_head)
        self._epsilon = torch.full((1, 1, 1), model.config.norm_eps)
        self._on_cpu = self.device.type == "cpu"
        # On CPU, torch's attention of one query takes 6 times as long over a bf16 cache as over one in fp32.
        self._cache_dtype = torch.float32 if self._on_cpu else self._dtype
        # On a GPU every step runs over all slots: steps are then alike, and one graph serves all.
        self._over_all_slots = not self._on_cpu
        self._slots = torch.empty(0, dtype=torch.int64)
        # Cosine and signed sine of each position for queries, and for keys, (S, E); one where they are alike.
        self._angles: dict[Kind, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        self._angles_are_long = False  # whether they are those of texts above the original context
        self.release()
        named = model.layers.named_modules()
        self._plain = all(is_matrix(module) for name, module in named if name.endswith("_proj"))
        self._use_graphs = self._plain and self.device.type == "cuda"
        self._row_step: RowStep | None = None

    def compile(self) -> None:
        """Have the steps of up to MOST_ROWS rows computed by a kernel, which is built in some seconds where it is not kept.

        Does nothing on a GPU, whose steps are graphs, and with adapters. InputError where it cannot be built. It rounds
        differently, so sampled text may differ from that of larger batches.
        """
        if not self._on_cpu or not self._plain or not is_matrix(self.model.lm_head):
            return
        try:
            self._row_step = RowStep(self.model)
        except UnavailableError as error:
            raise InputError(f"compiling: {error}") from error

    @property
    def bytes_per_position(self) -> int:
        """Bytes of the cache for one position of one row."""
        config = self.model.config
        return config.layers * 2 * config.kv_heads * config.head_size * self._cache_dtype.itemsize

    def read(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begin a batch with `prompts`; logits (B, V) after the last token of each, in fp32. Then `room` tokens fit."""
        longest = max(map(len, prompts))
        slots = -(-(longest + room) // ALIGNMENT) * ALIGNMENT
        batch = self._batch = self._new_cache(len(prompts), slots, length=longest + room)
        last = []
        for start, stop in _read_together([len(prompt) for prompt in prompts]):
            lengths = torch.tensor([len(prompt) for prompt in prompts[start:stop]])
            tokens = torch.zeros(stop - start, int(lengths.max()), dtype=torch.int64)  # padding at the end is never seen
            for row, prompt in enumerate(prompts[start:stop]):
                tokens[row, : len(prompt)] = torch.tensor(prompt)
            positions = self._slots[None, : tokens.shape[1]]
            hidden = self._hidden(tokens.to(self.device), positions, stored=batch.stored[:, start:stop])
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
        if self._row_step is not None and len(tokens) <= MOST_ROWS:
            return self._kernel_step(self._row_step)
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
        positions = batch.positions + offsets
        held = torch.cat([self._slots[: batch.filled].expand(len(tokens), -1), positions], 1)
        biases = self._biases(unseen, positions, held=held)
        hidden = self._hidden(tokens, positions, stored=stored, slots=slots, biases=biases)
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

    def _new_cache(self, rows: int, slots: int, *, length: int) -> KVCache:
        """An empty cache for texts of `length`. Its memory is reused: what an earlier batch left gets weight 0, as zeros
        would."""
        config = self.model.config
        self._set_angles(slots, length=length)
        positions = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        shape = (config.layers, rows, 2 * config.kv_heads, slots, config.head_size)
        if math.prod(shape) > len(self._cache):
            self.release()
            if self._on_cpu:  # the system gives zeros when they are first used: most texts are shorter than the context
                self._cache = torch.from_numpy(np.zeros(math.prod(shape), dtype=np.float32))
            else:
                self._cache = torch.zeros(math.prod(shape), dtype=self._cache_dtype, device=self.device)
        return KVCache(self._cache[: math.prod(shape)].view(shape), positions)

    def _eager_step(self) -> Tensor:
        batch = self._batch
        stored = batch.stored if self._over_all_slots else batch.stored[:, :, :, : batch.filled]
        held = self._slots[None, : stored.shape[3]]
        biases = self._biases((held > batch.positions)[:, None, None], batch.positions, held=held)
        logits = self._logits(self._hidden(batch.tokens, batch.positions, stored=stored, biases=biases)[:, -1])
        batch.positions += 1
        return logits

    def _kernel_step(self, kernel: RowStep) -> Tensor:
        batch = self._batch
        logits = kernel.logits(self._embedded(batch.tokens)[:, 0].contiguous(), batch.stored, batch.positions, self._angles)
        batch.positions += 1
        return self._finished(logits)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        normal = self._rms_norm(hidden.reshape(-1, 1, hidden.shape[-1]), self._final_norm)
        return self._finished(self._head(normal).float().view(*hidden.shape[:-1], -1))

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits as the model gives them, of those of the head."""
        if self.model.logit_divisor != 1:
            logits.div_(self.model.logit_divisor)
        return capped(logits, self.model.config.parts.final_softcap)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, (..., D) in fp32, of tokens (...)."""
        x: Tensor = self.model.model.embed_tokens(tokens).float()
        return x if self.model.embedding_scale == 1 else x * self.model.embedding_scale

    def _rms_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMSNorm of x (N, 1, D), in the dtype of the products; x itself where there is no norm."""
        if weight is None:
            return x.to(self._dtype)
        x = x.float()
        if not self._on_cpu:
            return torch.rms_norm(x, weight.shape, weight, self.model.config.norm_eps).to(self._dtype)
        # On CPU torch needs ten operations; here the mean square is one, the product of each position with itself.
        scale = torch.baddbmm(self._epsilon, x, x.mT, alpha=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight).to(self._dtype)

    def _set_angles(self, slots: int, *, length: int) -> None:
        """Have the angles of so many slots, for texts of at most `length`."""
        config = self.model.config
        is_long = isinstance(config.rope_scaling, LongRope) and length > config.rope_scaling.original_context
        if slots <= len(self._slots) and is_long == self._angles_are_long:
            return
        self._slots = torch.arange(max(slots, len(self._slots)), device=self.device)
        self._angles_are_long = is_long
        for kind in set(self.model.kinds):
            angles = rope_angles(config, self._slots[None], kind=kind, lengths=length)
            keys = self._table(None if angles is None else angles[1])
            self._angles[kind] = (self._table(angles[0]) if config.parts.query_growth and angles else keys), keys

    def _table(self, waves: Waves | None) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine (S, E) of every channel of a head, angle 0 for those that are not rotated."""
        cosine = torch.ones(len(self._slots), self.model.config.head_size, device=self.device)
        sine = torch.zeros_like(cosine)
        if waves is not None:
            half = self.model.config.rotated_size // 2
            for part, sign in ((slice(half), -1), (slice(half, 2 * half), 1)):
                cosine[:, part], sine[:, part] = waves[0][0, 0], sign * waves[1][0, 0]
        return cosine, sine

    def _rotation(self, kind: Kind, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B or 1, T, H + 2 K, E) at `positions`. Values get angle 0: one operation then serves all heads."""
        config = self.model.config
        queries, keys = self._angles[kind]
        parts = [(queries, config.heads + config.kv_heads)]
        if queries is not keys:
            parts = [(queries, config.heads), (keys, config.kv_heads)]
        cosine, sine = (
            torch.cat([pair[which][positions][:, :, None].expand(-1, -1, heads, -1) for pair, heads in parts], 2)
            for which in (0, 1)
        )
        return pad(cosine, (0, 0, 0, config.kv_heads), value=1.0), pad(sine, (0, 0, 0, config.kv_heads))

    def _biases(self, unseen: Tensor, positions: Tensor, *, held: Tensor) -> dict[bool, Tensor]:
        """What is added to scores in layers without and with a window, (B, 1, G T, S).

        Tokens at `positions` (B, T) do not see the slots where `unseen` (B, 1, T, S) is true; `held` (B or 1, S) are the
        positions in the slots.
        """
        group, window = self.model.config.heads // self.model.config.kv_heads, self.model.config.parts.window
        late = {False: unseen}
        if window is not None:
            late[True] = unseen | (held[:, None] <= positions[:, :, None] - window)[:, None]
        repeated = {slides: hidden.repeat(1, 1, group, 1) for slides, hidden in late.items()}
        return {
            slides: torch.zeros_like(hidden, dtype=self._cache_dtype).masked_fill_(hidden, -torch.inf)
            for slides, hidden in repeated.items()
        }

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        stored: Tensor,
        slots: Tensor | None = None,
        biases: dict[bool, Tensor] | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after all layers, in fp32, for tokens (B, T) at `positions` (B or 1, T).

        Their keys and values go to `slots` (1, T), by default those of their positions, of `stored` (layers, B, 2 K, S, E).
        `biases` are those of `_biases`; without them, each sees these tokens up to itself.
        """
        config = self.model.config
        kv_heads, scale, softcap = config.kv_heads, config.parts.residual_scale, config.parts.attention_softcap
        flat = (tokens.numel(), 1, -1)
        rotations = {kind: self._rotation(kind, positions) for kind in self._angles}
        places, rows = positions if slots is None else slots, self._batch.rows[: len(tokens)]
        windows = {False: None, True: config.parts.window}
        masks = {
            slides: attention_mask(tokens.shape[1], documents=None, device=self.device, window=window)
            for slides, window in windows.items()
            if biases is None
        }
        caches = zip(stored.unbind(0), stored[:, :, :kv_heads].unbind(0), stored[:, :, kv_heads:].unbind(0), strict=True)
        x = self._embedded(tokens.reshape(-1, 1))  # (B T, 1, D)
        for layer, (cache, keys, values) in zip(self._layers, caches, strict=True):
            normal = self._rms_norm(x, layer.norms[0])
            q, new = layer.queries_and_new(normal, rotations[layer.kind], self._cache_dtype)
            cache[rows, :, places] = new
            if biases is None:
                q, k, v = (part.to(self._dtype) for part in (q, *new.transpose(1, 2).chunk(2, 1)))
                mixed = attend(q, k, v, mask=masks[layer.kind == "window"], softcap=softcap)
            else:
                mixed = attend_cached(q, keys, values, bias=biases[layer.kind == "window"], softcap=softcap)
            mixed = layer.output(mixed.transpose(1, 2).reshape(flat).to(self._dtype))
            x = torch.add(x, mixed if layer.norms[1] is None else self._rms_norm(mixed, layer.norms[1]), alpha=scale)
            gate, up = layer.gate_up(self._rms_norm(x, layer.norms[2])).chunk(2, -1)
            inner = layer.down(activate(gate, config.parts.gate).mul_(up))
            x = torch.add(x, inner if layer.norms[3] is None else self._rms_norm(inner, layer.norms[3]), alpha=scale)
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


build = DecoderDecoding  # the registry's entry
