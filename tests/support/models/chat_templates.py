"""Chat templates with the traits of well-known ones, in their fewest lines, and a tokenizer that has their tokens."""

from functools import cache
from itertools import groupby

from tokenizers import AddedToken, Tokenizer

from llm.errors import InputError
from llm.tokenizer.messages import Chat
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|tool|>", "<|bot|>", "<filename>", "<|im_sep|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<td>")  # not special

# Like SmolLM2: what is said is written as it is.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: reasoning is only written after the user's last turn, where a block is written even without any.
HYBRID = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{% for t in tools %}{{- t | tojson }}{% endfor %}{{- '<|im_end|>\n' "
    "}}{% endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set r = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}{%- set r = content.split('</think>')[0] %}{%- set content = 'cut' %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or r) %}{{- '<think>\n' + r + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for call in m.tool_calls or [] %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{- call.function.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# Like R1-Distill: reasoning is never written, and the prompt opens it.
DROPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|bot|>' + m.content.split('</think>')[-1] + '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|><think>\n' }}{% endif %}"
)
# Phi-4's own, as published: no tools and no calls, and what a message of another role says is left out.
PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# Like GLM-4: no token ends an answer but that of the next role.
ENDLESS = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'tool': '<|tool|>', 'assistant': '<|bot|>'}[m.role] }}{{ '\n' + "
    "m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
# Like LFM2.5: what is marked as learned has the line break after the end token.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like DeepSeek-V3: calls only where the content is null, with arguments as text; the definitions of tools are ignored.
CALLING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'tool' %}"
    "{{ '<|tool|>' + m.content }}{% elif m.content is none %}{{ '<|bot|>' }}{% for call in m.tool_calls %}"
    "{{ '<tool_call>' + call.function.name + '\n' + call.function.arguments + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|bot|>' + m.content + '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


@cache
def _vocabulary() -> str:
    text = "a chat about the heart, the lungs and the liver; 心脏和肺以及肝脏。 One? Two. Three? Four. "
    trained = train_bpe([text * 20], 330, min_frequency=2, pre_tokenizer_name="qwen2", allow_smaller=True)
    made = Tokenizer.from_str(trained._marked.to_str())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return made.to_str()


def tokenizer_with(template: str, *, end: str = "<|im_end|>", begin: str | None = None) -> TextTokenizer:
    """A small tokenizer with the tokens of these templates."""
    named = {"eos_token": end} | ({} if begin is None else {"bos_token": begin})
    return TextTokenizer(Tokenizer.from_str(_vocabulary()), named, template)


def learned(tokenizer: TextTokenizer, chat: Chat) -> list[str]:
    """Each part of a chat as text, with brackets around what is learned; InputError if the chat is refused."""
    (parts,) = tokenizer.encode_parts([chat])
    if isinstance(parts, InputError):
        raise parts
    shown = []
    for part in parts:
        runs = groupby(zip(part.ids, part.loss_mask, strict=True), key=lambda pair: pair[1])
        texts = [(counts, tokenizer.decode([token for token, _ in run], special=True)) for counts, run in runs]
        shown.append("".join(f"[{text}]" if counts else text for counts, text in texts))
    return shown
