"""Tiny models as others publish them: built and saved by stock Transformers, with the kinds of tokenizers of Llama models.

The tokenizers are trained here by the `tokenizers` library; the chat templates are written in the manner of each family.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizer_kinds import every_merge
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The heart pumps blood through the body. What does the heart do? It pumps blood.",
    "The lungs breathe air. What do the lungs do? They breathe air, day and night.",
    "发烧和头痛是常见症状。多喝水，多休息。",
    "User: one two three\nAssistant: 3, 14 and 1592.",
] * 3

LLAMA_2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3_TEMPLATE = (
    "{{- bos_token }}{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
    "{% endfor %}"
)


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: words begin with ▁, unknown characters fall back to bytes, and no pre-tokenizer."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False, initial_alphabet=["▁"]))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = every_merge(["".join(merge) for merge in learned["merges"]], ids)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, specials: list[str], *, begin: str | None) -> Tokenizer:
    """As Llama 3's and SmolLM's: a BPE over bytes. Special tokens come last, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    trimming: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if begin is not None:
        special = [(begin, tokenizer.token_to_id(begin))]
        trimming.append(processors.TemplateProcessing(single=f"{begin} $A", special_tokens=special))
    tokenizer.post_processor = processors.Sequence(trimming)
    return tokenizer


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype, shard: str = "1GB", **fields: Any) -> Path:
    """Draw the weights of a tiny model and save all of it as Transformers does."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ends = fields.pop("ends", None)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | {"initializer_range": 0.2} | fields))).to(dtype)
    if ends is not None:
        model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def llama_2(folder: Path, **fields: Any) -> Path:
    """No padding token, as many key heads as query heads, fp16."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_like(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA_2_TEMPLATE,
    )
    return save(folder, tokenizer, dtype=torch.float16, **fields)


def llama_3(folder: Path, **fields: Any) -> Path:
    """The llama3 scaling, two tokens that end generation, bf16, in shards."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level(cut, specials, begin="<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA_3_TEMPLATE
    )
    ends = [backend.token_to_id("<|end_of_text|>"), backend.token_to_id("<|eot_id|>")]
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    given = {"num_key_value_heads": 2, "rope_parameters": scaling, "ends": ends, "shard": "30KB", "head_dim": 16}
    return save(folder, tokenizer, dtype=torch.bfloat16, **(given | fields))


def smollm(folder: Path, **fields: Any) -> Path:
    """A tied head, padding that is the end token, and an embedding with more rows than there are tokens; fp32."""
    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend = byte_level(cut, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], begin=None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )
    given = {"vocab_size": 384, "tie_word_embeddings": True, "num_key_value_heads": 1}
    return save(folder, tokenizer, dtype=torch.float32, **(given | fields))


def tinyllama(folder: Path, **fields: Any) -> Path:
    """Linear scaling, a padding token that is the end token; bf16."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_like(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=ZEPHYR_TEMPLATE,
    )
    scaling = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return save(folder, tokenizer, dtype=torch.bfloat16, **({"num_key_value_heads": 2, "rope_parameters": scaling} | fields))


FAMILIES: dict[str, Callable[..., Path]] = {
    "llama-2": llama_2,
    "llama-3": llama_3,
    "smollm": smollm,
    "tinyllama": tinyllama,
}
