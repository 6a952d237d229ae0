"""Renders chats with a template and finds what the loss counts: the answers, each with the token that ends it.

A template may mark them. Otherwise an answer is what the template adds for it after the prompt that inference would give.
Templates of models that reason write an earlier answer in another way than the last one (without its reasoning, say), but
inference only ever writes a last one. So where the chat up to an answer is not the beginning of the whole chat, that answer
is learned in a *part* of its own: the chat up to there.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm.errors import InputError
from llm.tokenizer.chat_template import CHAT_TEMPLATE, PLAIN_TEMPLATE, Span, is_marked, render_chats
from llm.tokenizer.control_tokens import ControlTokens
from llm.tokenizer.messages import Chat, PreparedMessage, prepare, prepare_tools
from llm.tokenizer.render_process import Rendered
from llm.tokenizer.template_abilities import Abilities

_EMPTY_THINK = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
_THINK, _AFTER_THINK = "<think>", "\n</think>\n\n"
_SWITCH = "enable_thinking"  # the variable by which templates write prompts for an answer with or without reasoning

Request = dict[str, Any]
Steps = Generator[list[Request], list[Rendered | InputError], "list[Part]"]  # asks for renderings, returns parts


@dataclass(frozen=True)
class Part:
    """The beginning of a chat as text, and the answers that are learned in it."""

    stop: int  # messages
    text: str  # with stand-ins for what could begin a control token
    spans: tuple[Span, ...]
    answers: tuple[int, ...]  # the learned messages


@dataclass(frozen=True)
class _Prepared:
    messages: list[PreparedMessage]
    tools: list[Any] | None

    def request(
        self, stop: int, switch: bool | None, *, after: Sequence[Mapping[str, Any]] = (), prompt: bool = False
    ) -> Request:
        """For the first `stop` messages, and those of `after`; with `prompt`, up to where the assistant answers."""
        options: dict[str, Any] = {"add_generation_prompt": True} if prompt else {}
        request: Request = {"messages": [*(message.fields for message in self.messages[:stop]), *after]}
        if self.tools is not None:
            request["tools"] = self.tools
        if switch is not None:
            options[_SWITCH] = switch
        return request | {"options": options} if options else request


@dataclass(frozen=True)
class _Answer:
    """An answer at the end of the chat up to it."""

    number: int  # of the message
    text: str
    start: int  # characters
    end: int


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one template."""

    template: str
    special_tokens: Mapping[str, str]
    control: ControlTokens
    ends: tuple[str, ...] = ()  # tokens that end an answer, the end token first
    learns_empty_think: bool = False  # also an empty think block, which the template writes without being asked
    abilities: Abilities = field(init=False)

    def __post_init__(self) -> None:
        def texts(requests: Sequence[Mapping[str, Any]]) -> list[str | InputError]:
            return [found if isinstance(found, InputError) else found[0] for found in self._render(requests)]

        object.__setattr__(self, "abilities", Abilities(texts))

    def prompt(self, chat: Chat, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> str:
        """A chat as text with stand-ins, by default up to where the assistant answers; InputError if it is refused.

        `thinking` sets whether the answer begins with reasoning, in templates that leave that open; None leaves it to them.
        """
        prepared = self._prepared(chat)
        switch = thinking if self.has_switch else None
        (found,) = self._render([prepared.request(len(chat), switch, prompt=add_generation_prompt)])
        return _text(found)

    def parts(self, chats: Sequence[Chat]) -> list[list[Part] | InputError]:
        """The parts of each chat that together have all of its answers, or why it is refused; the last one is the longest."""
        work = self._marked_parts if is_marked(self.template) else self._found_parts
        return self._all_at_once([work(chat) for chat in chats])

    def _all_at_once(self, all_steps: Sequence[Steps]) -> list[list[Part] | InputError]:
        """Drives the steps of many chats, with the renderings that they ask for in one request."""
        done: dict[int, list[Part] | InputError] = {}
        answers: dict[int, list[Rendered | InputError] | None] = dict.fromkeys(range(len(all_steps)))
        while answers:
            asked: dict[int, list[Request]] = {}
            for number, found in answers.items():
                try:
                    asked[number] = next(all_steps[number]) if found is None else all_steps[number].send(found)
                except StopIteration as end:
                    done[number] = end.value
                except InputError as error:
                    done[number] = error
            rendered = iter(self._render([request for requests in asked.values() for request in requests]) if asked else ())
            answers = {number: [next(rendered) for _ in requests] for number, requests in asked.items()}
        return [done[number] for number in range(len(all_steps))]

    def _marked_parts(self, chat: Chat) -> Steps:
        """By the marks of the template."""
        prepared = self._prepared(chat)
        learned, stop = _learned(prepared)
        separately = len(learned) > 1 and self._rewrites
        stops = [number + 1 for number in learned] if separately else [stop]
        rendered = yield [prepared.request(end, self._switch(prepared, end)) for end in stops]
        if not separately:
            text, spans = _rendered(rendered[0])
            spans = [self._trimmed(text, span) for span in spans]
            answers = [number for number, message in enumerate(prepared.messages[:stop]) if _is_answer(message)]
            if len(learned) < len(answers):
                if len(spans) != len(answers):
                    raise InputError(
                        f"expected a chat template that marks each answer once, since weight = 0 leaves one out, got "
                        f"{len(spans)} "
                        f"marks for {len(answers)} answers"
                    )
                spans = [span for span, number in zip(spans, answers, strict=True) if number in learned]
            return [Part(stop, text, tuple(spans), tuple(learned))]
        found = []
        for number, one in zip(learned, rendered, strict=True):
            text, spans = _rendered(one)
            if not spans:
                raise InputError("the chat template marks no part of an answer as learned")
            found.append(_Answer(number, text, *self._trimmed(text, spans[-1])))
        return _grouped(found)

    def _found_parts(self, chat: Chat) -> Steps:
        """By the prompts of the answers, where the template marks nothing."""
        prepared = self._prepared(chat)
        learned, stop = _learned(prepared)
        switches = [self._switch(prepared, number + 1) for number in learned]
        first = [prepared.request(stop, self._switch(prepared, stop))]
        first += [prepared.request(number, switch, prompt=True) for number, switch in zip(learned, switches, strict=True)]
        rendered = yield first
        whole, prompts = _text(rendered[0]), [_text(found) for found in rendered[1:]]
        spans = [
            self._plain_span(whole, prompt, prepared.messages[number]) for number, prompt in zip(learned, prompts, strict=True)
        ]
        if all(span is not None for span in spans):
            return [Part(stop, whole, tuple(span for span in spans if span is not None), tuple(learned))]
        rendered = yield [
            prepared.request(number + 1, switch) for number, switch in zip(learned[:-1], switches[:-1], strict=True)
        ]
        texts = [*map(_text, rendered), whole]
        found: list[_Answer] = []
        for number, switch, prompt, text in zip(learned, switches, prompts, texts, strict=True):
            answer = self._added(number, text, prompt, prepared.messages[number])
            if answer.end < 0:
                after = _next_message(prepared.messages[number])
                following = yield [prepared.request(number + 1, switch, after=[after])]
                answer = self._with_end(answer, following[0], prepared.messages[number])
            found.append(answer)
        return _grouped(found)

    def _plain_span(self, whole: str, prompt: str, message: PreparedMessage) -> Span | None:
        """An answer of text alone that follows its prompt in the whole chat; None for any other."""
        if message.reasoning is not None or len(message.fields) > 2 or not whole.startswith(prompt):
            return None
        start = self._after_empty_think(whole, len(prompt))
        content = message.words[0]
        place = start
        while place < len(whole) and whole[place].isspace():
            place += 1
        if not content or not whole.startswith(content, place):
            return None
        end = self.control.any.search(whole, place + len(content))
        return None if end is None else (start, end.end())

    def _added(self, number: int, text: str, prompt: str, message: PreparedMessage) -> _Answer:
        """What the template adds for the answer that ends `text`; its end is -1 if no token ends it."""
        start = len(prompt)
        if not text.startswith(prompt):
            before, opened, rest = prompt.rpartition(_THINK)
            if not opened or rest.strip() or not text.startswith(before):
                raise _unmarked("an earlier part of a chat changes with what follows")
            if text[len(before) :].lstrip().startswith(_THINK):
                start = text.index(_THINK, len(before)) + len(_THINK)
            else:  # the prompt opens a think block, and the template drops it from the chat
                text = prompt + (message.reasoning or "").strip() + _AFTER_THINK + text[len(before) :]
        if (missing := next((word for word in message.words if word not in text[start:]), None)) is not None:
            shown = self.control.restored(missing[:80])
            raise _unmarked(f"the assistant's text is not rendered unchanged, {shown!r} is missing")
        if message.reasoning is None:
            start = self._after_empty_think(text, start)
        return _Answer(number, text, start, self._last_end(text, start, len(text)))

    def _with_end(self, answer: _Answer, following: Rendered | InputError, message: PreparedMessage) -> _Answer:
        """The answer with the token that begins the next turn, where that is what ends it (GLM), or else the end token."""
        text = answer.text.rstrip() if answer.end < 0 else answer.text
        found = None
        if not isinstance(following, InputError) and following[0].startswith(text):
            found = self.control.any.match(following[0], len(text) + _spaces(following[0], len(text)))
        if found is not None and (found.group() in self.ends or "tool_calls" not in message.fields):
            end = found.group() if found.group() in self.control.special else ""
        else:  # what follows a call may be a result's token, by which no generation ends (DeepSeek-V3)
            end = self.ends[0] if found is not None and self.ends else ""
        if end:
            return _Answer(answer.number, text + end, answer.start, len(text) + len(end))
        raise _unmarked("no end token follows the assistant's text")

    def _last_end(self, text: str, start: int, stop: int) -> int:
        """Where the special token ends that is the last of `text[start:stop]` but for white space; -1 without any."""
        while stop > start and text[stop - 1].isspace():
            stop -= 1
        return stop if text.endswith(self._special, start, stop) else -1

    def _trimmed(self, text: str, span: Span) -> Span:
        """A marked span without an empty think block before the answer, and without white space after the end token."""
        end = self._last_end(text, *span)
        return self._after_empty_think(text, span[0]), (span[1] if end < 0 else end)

    def _after_empty_think(self, text: str, start: int) -> int:
        found = None if self.learns_empty_think else _EMPTY_THINK.match(text, start)
        return start if found is None else found.end()

    @cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(self.control.special)

    @cached_property
    def has_switch(self) -> bool:
        """Whether the template leaves open if an answer begins with reasoning."""
        return _SWITCH in self.template

    def _switch(self, prepared: _Prepared, stop: int) -> bool | None:
        """Whether the last of the first `stop` messages has reasoning; None to leave it to the template."""
        if not self.has_switch or self.learns_empty_think or not stop:
            return None
        return prepared.messages[stop - 1].reasoning is not None

    @cached_property
    def _rewrites(self) -> bool:
        """Whether the template writes an answer in another way once the chat goes on."""
        if self.template in (CHAT_TEMPLATE, PLAIN_TEMPLATE):
            return False
        user, answer = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}
        for last in (answer, answer | {"reasoning_content": "Reasons."}):
            found = self._render([{"messages": [user, last]}, {"messages": [user, last, user, last]}])
            first, whole = (_text(one) for one in found)
            if not whole.startswith(first.rstrip()):
                return True
        return False

    def _prepared(self, chat: Chat) -> _Prepared:
        tools = prepare_tools(chat[0].get("tools") if chat else None, self.control, self.abilities)
        messages = []
        for message in chat:
            try:
                messages.append(prepare(message, self.control, self.abilities))
            except InputError as error:
                raise InputError(f"the {message['role']}'s turn: {error}") from error
        return _Prepared(messages, tools)

    def _render(self, requests: Sequence[Mapping[str, Any]]) -> list[Rendered | InputError]:
        return render_chats(requests, self.template, self.special_tokens, marked=is_marked(self.template))


def _is_answer(message: PreparedMessage) -> bool:
    return bool(message.fields["role"] == "assistant")


def _learned(prepared: _Prepared) -> tuple[list[int], int]:
    """The learned messages, and how many messages there are up to the last of them; all if none is learned."""
    learned = [number for number, one in enumerate(prepared.messages) if _is_answer(one) and one.is_learned]
    return learned, learned[-1] + 1 if learned else len(prepared.messages)


def _grouped(answers: Sequence[_Answer]) -> list[Part]:
    """As few parts as possible that have all answers."""
    parts: list[Part] = []
    left = list(answers)
    while left:
        longest = left[-1]
        inside = [answer for answer in left if longest.text.startswith(answer.text[: answer.end])]
        spans = tuple((answer.start, answer.end) for answer in inside)
        parts.append(Part(longest.number + 1, longest.text, spans, tuple(answer.number for answer in inside)))
        left = [answer for answer in left if answer not in inside]
    return parts[::-1]


def _next_message(answer: PreparedMessage) -> dict[str, Any]:
    """A message that may follow an answer."""
    if "tool_calls" not in answer.fields:
        return {"role": "user", "content": "Question?"}
    call = answer.fields["tool_calls"][-1]
    return {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": "Result."}


def _spaces(text: str, start: int) -> int:
    return len(text) - start - len(text[start:].lstrip())


def _rendered(found: Rendered | InputError) -> Rendered:
    if isinstance(found, InputError):
        raise found
    return found


def _text(found: Rendered | InputError) -> str:
    return _rendered(found)[0]


def _unmarked(why: str) -> InputError:
    return InputError(
        f"the chat template does not mark the assistant's turns, and they cannot be located: {why}; put the assistant's text "
        "and the end token after it between {% generation %} and {% endgeneration %}"
    )
