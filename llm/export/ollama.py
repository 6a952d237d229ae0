"""Writes Ollama's Modelfile for a GGUF file: its chat template, the tokens that end an answer, context and sampling.

Ollama needs the chat template in Go's template language. It never runs the one in the GGUF file: if that is nearly one of
those it knows, it takes its own for it, and else it writes the user's text alone (template/template.go and server/model.go of
Ollama). So the template is found by rendering chats with the model's own: what stands around the texts, if that is always the
same. This covers ChatML, Llama 3, Gemma, Mistral, Phi and their like, with a default system text, or the system text in the
user's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llm.errors import InputError
from llm.models.sampling_defaults import Sampling, as_sampled
from llm.tokenizer.tokenizer import ChatMessage, TextTokenizer

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "SYSTEMTEXT", "USERTEXT", "ASSISTANTTEXT", "SECONDTEXT"
PARAMETERS = {"repetition_penalty": "repeat_penalty"}  # sampling fields that Ollama has under another name
NO_TEMPLATE = """# No TEMPLATE: the model's chat template does more than Ollama can be told here, and Ollama does not run it.
# Chat by llama.cpp, which does."""

NO_SYSTEM = "# The model's chat template has no system turn: Ollama leaves out what SYSTEM or a chat says there."


@dataclass(frozen=True)
class ChatFrame:
    """The text around the turns of a chat, without the begin token."""

    opening: str  # of a chat without a system turn, such as a default one
    system: tuple[str, str] | None  # before and after; None if there is no such turn
    user: str  # before
    user_after_system: str  # the same right after a system turn
    assistant: tuple[str, str]  # before and after
    generation: str  # after the last user's text, where the assistant answers

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """A chat that begins with a user's or a system turn and ends with a user's."""
        texts, before = [], ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                assert self.system is not None
                texts.append(self.system[0] + content + self.system[1])
            elif role == "assistant":
                texts.append(self.assistant[0] + content + self.assistant[1])
            else:
                opening = self.opening if not before else ""
                texts.append(opening + (self.user_after_system if before == "system" else self.user) + content)
            before = role
        return "".join(texts) + self.generation

    def go_template(self) -> str:
        """The frame in Go's template language."""
        opening = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.opening}{{{{ end }}}}' if self.opening else ""
        user = self.user
        if self.system is not None and self.user_after_system != self.user:
            after_system = '{{ if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}'
            user = f"{after_system}{self.user_after_system}{{{{ else }}}}{self.user}{{{{ end }}}}"
        turns = [] if self.system is None else [("system", *self.system)]
        turns += [("user", user, ""), ("assistant", *self.assistant)]
        branches = " else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{' for role, before, after in turns
        )
        numbered = "$i, $_ := " if "$i" in user else ""
        return f"{opening}{{{{ range {numbered}.Messages }}}}{{{{ {branches} end }}}}{{{{ end }}}}{self.generation}"


def modelfile(tokenizer: TextTokenizer, gguf: str, *, context: int, sampling: Sampling, adds_begin: bool) -> str:
    """The text of the Modelfile for the file named `gguf`. `adds_begin`: llama.cpp puts the begin token before a chat."""
    frame = find_frame(tokenizer, adds_begin=adds_begin)
    lines = [f"FROM ./{gguf}"]
    if frame is not None:
        if frame.system is None:
            lines.append(NO_SYSTEM)
        lines.append(f'TEMPLATE """{frame.go_template()}"""')
    elif tokenizer.template is not None:
        lines.append(NO_TEMPLATE)
    lines += [f'PARAMETER stop "{tokenizer.decode([token], special=True)}"' for token in tokenizer.ends]
    lines.append(f"PARAMETER num_ctx {context}")
    lines += [f"PARAMETER {PARAMETERS.get(field, field)} {value:g}" for field, value in as_sampled(sampling).items()]
    return "\n".join(lines) + "\n"


def find_frame(tokenizer: TextTokenizer, *, adds_begin: bool) -> ChatFrame | None:
    """The frame of the chat template; None if the template does more."""
    if tokenizer.template is None:
        return None
    begin = tokenizer.decode([tokenizer.begin], special=True) if adds_begin else ""
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    again, system = {"role": "user", "content": _AGAIN}, {"role": "system", "content": _SYSTEM}
    chats: list[list[ChatMessage]] = [[user], [user, assistant, again]]
    guided: list[list[ChatMessage]] = [[system, *chat] for chat in chats]
    try:
        texts = [tokenizer.render(chat, add_generation_prompt=True) for chat in chats]
    except InputError:
        return None
    try:
        with_system = [tokenizer.render(chat, add_generation_prompt=True) for chat in guided]
        if any(_SYSTEM in text for text in with_system):  # else the template drops it
            texts, chats = texts + with_system, chats + guided
    except InputError:  # a template that refuses a system turn
        pass
    if not all(text.startswith(begin) for text in texts) or any(mark in text for text in texts for mark in ("{{", '"""')):
        return None
    texts = [text.removeprefix(begin) for text in texts]
    frame = _frame(texts, ends=[tokenizer.decode([token], special=True) for token in tokenizer.ends])
    return frame if all(frame.render(chat) == text for chat, text in zip(chats, texts, strict=True)) else None


def _frame(texts: Sequence[str], *, ends: Sequence[str]) -> ChatFrame:
    """The frame that explains chats of one user's turn and of three turns, and the same after a system turn if they are
    there."""
    before_first, _, generation = texts[0].partition(_USER)
    before_answer, _, rest = texts[1].partition(_USER)[2].partition(_ASSISTANT)
    before_again = rest.partition(_AGAIN)[0]
    user = _without_end(_common_end(before_first, before_again), ends)
    system, after_system = None, user
    if texts[2:]:
        before_system, _, guided = texts[2].partition(_SYSTEM)
        between = guided.partition(_USER)[0]
        shares = between.endswith(user)
        system = (before_system, between.removesuffix(user) if shares else "")
        after_system = user if shares else between
    return ChatFrame(
        opening=before_first.removesuffix(user),
        system=system,
        user=user,
        user_after_system=after_system,
        assistant=(before_answer, before_again.removesuffix(user)),
        generation=generation,
    )


def _common_end(first: str, second: str) -> str:
    length = next((i for i in range(min(len(first), len(second))) if first[-1 - i] != second[-1 - i]), None)
    length = min(len(first), len(second)) if length is None else length
    return first[len(first) - length :]


def _without_end(text: str, ends: Sequence[str]) -> str:
    """What begins a turn, without the end of the turn before."""
    for end in ends:
        if end in text:
            text = text.rpartition(end)[2].removeprefix("\n")
    return text
