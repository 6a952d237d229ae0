"""The Modelfile by which Ollama runs a GGUF file: what its chats look like, where answers end, how long they may be.

Ollama writes chats by a template in Go's language. It is found by rendering: what the model's own template puts around the
texts of a chat, if that is always the same.
"""

from dataclasses import dataclass

from llm.errors import InputError
from llm.tokenizer.tokenizer import TextTokenizer

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "SYSTEMTEXT", "USERTEXT", "ASSISTANTTEXT", "SECONDTEXT"


@dataclass(frozen=True)
class Frame:
    """What stands around the texts of a chat; the begin token is not part of it."""

    system: tuple[str, str]  # before and after
    user: str  # before
    assistant: tuple[str, str]  # before, which is where an answer begins, and after

    def go_template(self) -> str:
        """The same for Ollama."""
        return (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}'
            f'{{{{ else if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
            f"{{{{ end }}}}{{{{ end }}}}{self.assistant[0]}"
        )


def modelfile(tokenizer: TextTokenizer, gguf: str, *, context: int, adds_begin: bool) -> str:
    """The Modelfile beside the file `gguf`. `adds_begin`: llama.cpp puts the begin token before a chat itself."""
    frame = find_frame(tokenizer, adds_begin=adds_begin)
    lines = [f"FROM ./{gguf}"]
    if frame is not None:
        lines.append(f'TEMPLATE """{frame.go_template()}"""')
    lines += [f'PARAMETER stop "{tokenizer.decode([token], special=True)}"' for token in tokenizer.ends]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def find_frame(tokenizer: TextTokenizer, *, adds_begin: bool) -> Frame | None:
    """What the chat template puts around texts; None where it does more than that, and Ollama is left with the GGUF's own."""
    if tokenizer.template is None:
        return None
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    again, system = {"role": "user", "content": _AGAIN}, {"role": "system", "content": _SYSTEM}
    try:
        plain = tokenizer.render([user], add_generation_prompt=True)
        longer = tokenizer.render([user, assistant, again], add_generation_prompt=True)
        guided = tokenizer.render([system, user], add_generation_prompt=True)
    except InputError:  # a template without a system's turn, say
        return None
    begin = tokenizer.decode([tokenizer.begin], special=True) if adds_begin else ""
    if not all(text.startswith(begin) for text in (plain, longer, guided)):
        return None
    plain, longer, guided = (text.removeprefix(begin) for text in (plain, longer, guided))
    before_user, _, answer = plain.partition(_USER)
    after_answer = longer.partition(_ASSISTANT)[2].partition(_AGAIN)[0].removesuffix(before_user)
    before_system, _, rest = guided.partition(_SYSTEM)
    frame = Frame((before_system, rest.partition(_USER)[0].removesuffix(before_user)), before_user, (answer, after_answer))
    rebuilt = (
        f"{before_user}{_USER}{answer}{_ASSISTANT}{after_answer}{before_user}{_AGAIN}{answer}",
        f"{frame.system[0]}{_SYSTEM}{frame.system[1]}{before_user}{_USER}{answer}",
    )
    if rebuilt != (longer, guided) or any(mark in text for text in rebuilt for mark in ("{{", '"""')):
        return None
    return frame
