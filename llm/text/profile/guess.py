"""A guess of what rows are for, by names, types and values of their fields: documents, pairs, chats, labels, preferences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm.text.profile import FieldProfile, Profile
from llm.text.readers import WHOLE

Kind = Literal["labels", "pairs", "chats", "preferences", "documents"]
KINDS: tuple[Kind, ...] = ("labels", "pairs", "chats", "preferences", "documents")
# Names of fields in lower case, the most likely first.
TEXTS = (
    "text",
    "content",
    "body",
    "document",
    "review text",
    "review",
    "sentence",
    "comment",
    "message",
    "article",
    "abstract",
)
PROMPTS = ("prompt", "question", "instruction", "query", "input", "source", "user")
RESPONSES = ("response", "answer", "output", "completion", "target", "reply", "assistant")
LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "sentiment",
    "intent",
    "topic",
    "section",
    "rating",
    "stars",
    "tag",
    "tags",
    "topics",
    "categories",
    "genres",
    "target",
)
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue")
FEWEST_PER_CLASS = 3  # rows, of a field that no name makes a label
MOST_CLASSES = 30  # the same


@dataclass(frozen=True)
class Guess:
    """What rows are for, and the fields that say it."""

    kind: Kind
    text: str = ""  # the field that is read: the document, the text to classify, or the prompt
    label: str = ""  # the field that is learned: the label, or the response
    extra: str = ""  # of pairs, a field that belongs to the prompt and is often empty
    why: str = ""  # what else the user should know
    several: str = ""  # "list": rows have several labels

    @property
    def prompt(self) -> str:
        """The template of the prompt."""
        return f"{{{self.text}}}" + (f"\n\n{{{self.extra}}}" if self.extra else "")


def guess(profile: Profile, *, kind: Kind | None = None, text: str = "", label: str = "") -> Guess | None:
    """The guess for `profile`, with what the user said already; None if no field holds text.

    `text` and `label` are fields; `kind` is one of KINDS.
    """
    fields = {name: one for name, one in profile.fields.items() if one.lengths.counts}
    if label and kind is None:
        kind = "labels" if _is_label(profile.fields.get(label)) or _is_list(profile.fields.get(label)) else "pairs"
    if found := _by_structure(profile, kind):
        return found
    text = text or _text(fields, besides=label)
    if not text:
        return None
    kinds = [kind] if kind else ["documents"] if set(profile.formats) <= set(WHOLE) else ["pairs", "labels", "documents"]
    for one in kinds:
        if one == "documents":
            return Guess("documents", text)
        if one == "labels":
            name = label or _label(fields, text)
            if name and not _is_list(profile.fields.get(name)):
                return Guess("labels", text, name)
            if listed := label or _first(LABELS, {n: one for n, one in profile.fields.items() if _is_list(one)}):
                why = f"{listed!r} holds lists: rows have several labels"
                return Guess("labels", text, listed, why=why, several="list")
        if one == "pairs" and (found := _pair(fields, text, label, sure=kind is not None)):
            return found
    return None


def _by_structure(profile: Profile, kind: Kind | None) -> Guess | None:
    """Chats and preferences, which their fields tell."""
    names = profile.fields
    if kind in (None, "preferences") and {"chosen", "rejected"} <= set(names):
        return Guess("preferences", _first(PROMPTS, names) or "prompt", "chosen")
    messages = [name for name, one in names.items() if name.lower() in MESSAGES and one.types["a list"]]
    return Guess("chats", messages[0]) if messages and kind in (None, "chats") else None


def _pair(fields: dict[str, FieldProfile], text: str, label: str, *, sure: bool) -> Guess | None:
    """A prompt and its response, if their names are the usual ones, or the user says that there are some."""
    response = label or _first(RESPONSES, fields)
    prompt = next((name for name in (_first(PROMPTS, fields), text) if name and name != response), None)
    if not response and sure:
        response = next((name for name in reversed(fields) if name != prompt), "")
    if not prompt or not response:
        return None
    if not sure and (_first(PROMPTS, fields) is None or _is_label(fields.get(response))):
        return None
    extra = next((name for name in fields if name.lower() == "input" and name not in (prompt, response)), "")
    return Guess("pairs", prompt, response, extra if prompt.lower() == "instruction" else "")


def _text(fields: dict[str, FieldProfile], *, besides: str) -> str:
    """The field with the text: by its name, else the one whose values are longest."""
    known = {name: one for name, one in fields.items() if name != besides and one.types["text"]}
    named = _first(TEXTS, known) or _first(PROMPTS, known)
    return named or max(known, key=lambda name: known[name].lengths.quantile(0.5), default="")


def _label(fields: dict[str, FieldProfile], text: str) -> str:
    """The field with the label: by its name, else the one with the fewest values, each in several rows."""
    others = {name: one for name, one in fields.items() if name != text and _is_label(one)}
    if named := _first(LABELS, others):
        return named
    few = {
        name: one.values
        for name, one in others.items()
        if one.values and len(one.values) <= MOST_CLASSES and min(one.values.values()) >= FEWEST_PER_CLASS
    }
    return min(few, key=lambda name: len(few[name]), default="")


def _is_list(field: FieldProfile | None) -> bool:
    """Whether values are lists, and nothing else."""
    return bool(field and field.types["a list"] and field.types["a list"] == field.types.total())


def _is_label(field: FieldProfile | None) -> bool:
    """Whether the values of a field may be classes: at least two, that repeat."""
    return bool(field and field.values and 2 <= len(field.values) <= field.values.total() / 2)


def _first(names: Sequence[str], fields: "dict[str, FieldProfile]") -> str | None:
    """The field with the first of `names`, in capitals or not."""
    lower = {name.lower(): name for name in reversed(fields)}
    return next((lower[name] for name in names if name in lower), None)
