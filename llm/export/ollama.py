"""Writes Ollama's Modelfile for a GGUF file: its chat template, the tokens that end an answer, and the context length.

Ollama needs the chat template in Go's template language. It is found by rendering chats with the model's own template: what
stands around the texts, if that is always the same.
"""

from dataclasses import dataclass

from llm.errors import InputError
from llm.tokenizer.tokenizer import TextTokenizer

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "SYSTEMTEXT", "USERTEXT", "ASSISTANTTEXT", "SECONDTEXT"


@dataclass(frozen=True)
class ChatFrame:
    """The text around the turns of a chat, without the begin token."""

    system: tuple[str, str]  # before and after
    user: str  # before
    assistant: tuple[str, str]  # before, which is also the generation prompt, and after

    def go_template(self) -> str:
        """The frame in Go's template language."""
        return (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}'
            f'{{{{ else if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
            f"{{{{ end }}}}{{{{ end }}}}{self.assistant[0]}"
        )


def modelfile(tokenizer: TextTokenizer, gguf: str, *, context: int, adds_begin: bool) -> str:
    """The text of the Modelfile for the file named `gguf`. `adds_begin`: llama.cpp puts the begin token before a chat."""
    frame = find_frame(tokenizer, adds_begin=adds_begin)
    lines = [f"FROM ./{gguf}"]
    if frame is not None:
        lines.append(f'TEMPLATE """{frame.go_template()}"""')
    lines += [f'PARAMETER stop "{tokenizer.decode([token], special=True)}"' for token in tokenizer.ends]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def find_frame(tokenizer: TextTokenizer, *, adds_begin: bool) -> ChatFrame | None:
    """The frame of the chat template; None if the template does more, and Ollama has to use the one in the GGUF file."""
    if tokenizer.template is None:
        return None
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    again, system = {"role": "user", "content": _AGAIN}, {"role": "system", "content": _SYSTEM}
    try:
        plain = tokenizer.render([user], add_generation_prompt=True)
        longer = tokenizer.render([user, assistant, again], add_generation_prompt=True)
        guided = tokenizer.render([system, user], add_generation_prompt=True)
    except InputError:  # for example, a template that refuses a system turn
        return None
    begin = tokenizer.decode([tokenizer.begin], special=True) if adds_begin else ""
    if not all(text.startswith(begin) for text in (plain, longer, guided)):
        return None
    plain, longer, guided = (text.removeprefix(begin) for text in (plain, longer, guided))
    before_user, _, answer = plain.partition(_USER)
    after_answer = longer.partition(_ASSISTANT)[2].partition(_AGAIN)[0].removesuffix(before_user)
    before_system, _, rest = guided.partition(_SYSTEM)
    frame = ChatFrame((before_system, rest.partition(_USER)[0].removesuffix(before_user)), before_user, (answer, after_answer))
    rebuilt = (
        f"{before_user}{_USER}{answer}{_ASSISTANT}{after_answer}{before_user}{_AGAIN}{answer}",
        f"{frame.system[0]}{_SYSTEM}{frame.system[1]}{before_user}{_USER}{answer}",
    )
    if rebuilt != (longer, guided) or any(mark in text for text in rebuilt for mark in ("{{", '"""')):
        return None
    return frame
