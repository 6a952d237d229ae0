"""`run new FILE`: looks at your data, asks a few questions, and writes a recipe that runs as it is."""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.commands.check import read_profile
from runner.diagnostics.machine_speed import machine_speed
from runner.errors import RecipeError
from runner.files import write_whole
from runner.options import SHIPPED
from runner.recipe.new_recipe import CHAT, FEWEST_ROWS, GENERAL, HELD_OUT, SMALL, Answers, Hardware, Rows, recipe_text
from runner.recipe.recipe import load_recipe
from runner.resources import gpu_count

if TYPE_CHECKING:
    from llm.text.profile import Profile
    from llm.text.profile.guess import Guess, Kind

HARDWARE: tuple[Hardware, ...] = ("cpu", "gpu")
KINDS = ("labels", "pairs", "chats", "preferences", "documents")
LOOKED_AT = 50_000  # rows
WIDEST = 100  # characters of a cell that are shown
COPIES = "stockpot-data"  # the folder beside a recipe for the text that comes with Stockpot
NOTHING = "nothing"
WORTH_MEASURING = 5.0  # minutes from which on it matters how fast this machine is
UNEQUAL = 3  # times the rows of the rarest label that the most frequent one may have


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; each answers a question."""
    sub.add_argument("recipe", type=Path, metavar="FILE", help="the TOML file to write")
    sub.add_argument("--data", metavar="DATA", help="your rows or documents: a file, a glob or a folder; '' for none")
    sub.add_argument("--kind", choices=KINDS, help="what the rows are for")
    sub.add_argument("--text", metavar="FIELD", help="the field that is read")
    sub.add_argument("--label", metavar="FIELD", help="the field that is learned: a label, or the answer")
    sub.add_argument("--language", metavar="CODE", help="of the model: en, zh, both, or another one as de")
    sub.add_argument("--base", metavar="MODEL", help="a model to start from, as owner/name on the Hub or a folder; or nothing")
    sub.add_argument("--hardware", choices=HARDWARE, help="for training")
    sub.add_argument("--minutes", type=float, metavar="N", help="time limit of the whole recipe")
    sub.add_argument("--repo", metavar="OWNER/NAME", help="Hub repository to publish to; '' for none")
    sub.add_argument("--separator", metavar="TEXT", help="between the labels of a row, if it may have several, such as ';'")
    sub.add_argument("--encoding", metavar="NAME", help="of text files, instead of the one that is found")
    sub.add_argument("--delimiter", metavar="CHARACTER", help="of .csv files, instead of the one that is found")
    sub.add_argument("--sheet", metavar="NAME", help="of workbooks, instead of the first")
    sub.add_argument("--yes", action="store_true", help="ask nothing, and take the guesses")


def main(options: argparse.Namespace) -> int:
    """Looks at your data, asks what it is for, and writes a recipe with a split, a task and a gate that fit it."""
    path = options.recipe.expanduser().with_suffix(".toml")
    if path.exists():
        raise RecipeError(f"{path}: expected the name of a new file, but it exists")
    if not re.fullmatch(r"\w[\w.-]*", path.stem):
        raise RecipeError(f"FILE: expected a name of letters, digits, '.', '-' and '_', got {path.name!r}")
    given: dict[str, str] = {}
    try:
        answers = _answers(options, path, given)
        outside = _write(path, answers)
    except (RecipeError, KeyboardInterrupt, EOFError):
        if given and not options.yes and sys.stdin.isatty():
            words = [word for name, answer in given.items() for word in (f"--{name}", answer)]
            print(f"\nyour answers so far: {shlex.join(['run', 'new', str(options.recipe), *words])}", file=sys.stderr)
        raise
    named = shlex.quote(os.path.relpath(path))
    allow = "".join(f" --allow-path {shlex.quote(str(folder))}" for folder in outside)
    guessed = [word for name, answer in given.items() if getattr(options, name) is None for word in (f"--{name}", answer)]
    if guessed and (options.yes or not sys.stdin.isatty()):
        print(f"guessed, and an option changes each: {shlex.join(guessed)}", file=sys.stderr)
    print(f"wrote {path}\nread it, then:\n  run plan {named}{allow}\n  run {named}{allow}")
    return 0


def _answers(options: argparse.Namespace, path: Path, given: dict[str, str]) -> Answers:
    """Every answer: from the options, from the user, or by default; `given` gets those of the user as they come."""

    def ask(name: str, question: str, default: str, check: Callable[[str], str | None]) -> str:
        answer = _answer(
            None if (value := getattr(options, name)) is None else str(value), question, default, check, quiet=options.yes
        )
        given[name] = answer
        return answer

    data = ask("data", "your data: a file, a glob or a folder (empty for none)", "", _is_data)
    rows, found = None, "en"
    if data:
        profile = read_profile([data], options, most_rows=LOOKED_AT)
        rows = _rows(options, path, data, profile, ask)
        found = next(iter(profile.languages.most_common(1)), ("en", 0))[0]
    guess = found if re.fullmatch("[a-z]{2}", found) else "en"
    language = ask("language", "language of the model (en, zh, both, or a code as de)", guess, _language)
    small = SMALL.get(language, SMALL["en"])
    base = ask("base", f"start from {NOTHING}, or from a model, such as {small}", NOTHING, _model)
    best: Hardware = "gpu" if gpu_count() else "cpu"
    hardware = ask("hardware", "hardware to train on: cpu or gpu", best, lambda text: _one_of(text, HARDWARE))
    minutes = ask("minutes", "minutes for the whole recipe", "15", _minutes)
    repo = ask("repo", "owner/name of the Hub repository to publish to (empty for none)", "", _repo)
    folder = Path(base).expanduser()
    return Answers(
        name=path.stem,
        language=language,
        rows=rows,
        hardware=hardware,  # type: ignore[arg-type]  # one of HARDWARE
        minutes=float(minutes),
        speed=machine_speed(say=_say if float(minutes) >= WORTH_MEASURING else None) if hardware == best else None,
        repo=repo or None,
        base=None if base == NOTHING else str(folder.resolve()) if folder.is_dir() else base,
        # Preferences that hold their prompts inside are learned after general questions.
        shipped=_shipped(path) if base == NOTHING or (rows and rows.kind == "preferences" and not rows.prompt) else None,
    )


def _rows(options: argparse.Namespace, path: Path, data: str, profile: "Profile", ask: Callable[..., str]) -> Rows:
    """What the rows are for: shown, guessed and asked."""
    from llm.text.profile.guess import guess

    if not profile.rows or not profile.fields:
        reason = next((f": {fault['message']}" for fault in profile.faults.as_json()), "")
        raise RecipeError(f"{data}: expected rows that can be used, got none{reason}")
    for name in (options.text, options.label):
        if name and name not in profile.fields:
            raise RecipeError(f"{data}: expected one of the fields {', '.join(map(repr, profile.fields))}, got {name!r}")
    _show(data, profile)
    known = None if options.text or options.label else _known_form(profile)
    asked: Kind | None = options.kind or ("labels" if options.separator else None)
    first = guess(profile, kind=asked, text=options.text or "", label=options.label or "")
    if first is None:
        raise RecipeError(
            f"{data}: expected a field with text, got {', '.join(map(repr, profile.fields))}; name it by --text, and the one "
            "to learn by --label"
        )
    if first.why:
        print(first.why, file=sys.stderr)
    kind = ask("kind", f"the rows are for ({' / '.join(KINDS)})", first.kind, lambda text: _one_of(text, KINDS))
    made = guess(profile, kind=kind, text=options.text or "", label=options.label or "")  # type: ignore[arg-type]
    if made is None:
        raise RecipeError(
            f"{data}: expected rows for {kind}, got fields {', '.join(map(repr, profile.fields))}; see --text, --label"
        )
    if kind in ("labels", "documents") or (kind == "pairs" and known != "pairs"):
        fields = tuple(profile.fields)
        text = ask("text", "the field that is read", made.text, lambda name: _one_of(name, fields))
        label = made.label
        if kind != "documents":
            label = ask("label", "the field that is learned", made.label, lambda name: _one_of(name, fields))
        made = guess(profile, kind=made.kind, text=text, label=label) or made
    return _as_rows(options, path, data, profile, made, is_known=known == kind)


def _known_form(profile: "Profile") -> str | None:
    """The kind of the rows if a recipe knows their form by the names of fields: pairs, chats or preferences."""
    from llm.data.row_forms import read_chat, read_preference
    from llm.errors import InputError

    def all_read(read: Callable[[Any], object]) -> bool:
        try:
            return all(read(row) for row in profile.examples)
        except InputError:
            return False

    if all_read(read_preference):
        return "preferences"
    if not all_read(read_chat):
        return None
    return "chats" if any(isinstance(value, list) for row in profile.examples for value in row.values()) else "pairs"


def _as_rows(options: argparse.Namespace, path: Path, data: str, profile: "Profile", made: "Guess", *, is_known: bool) -> Rows:
    """`is_known`: the names of the fields say how rows are read."""
    inside = made.kind == "preferences" and (made.text not in profile.fields or not profile.fields[made.text].types["text"])
    of_text = profile.fields["chosen" if inside else made.text]  # a prompt may be inside both answers
    several = options.separator or made.several if made.kind == "labels" else ""
    values = profile.fields[made.label].values if made.kind == "labels" and not several else None
    empty_labels = {made.label} if several else set()  # a row may have none
    missing = {name: profile.fields[name] for name in (made.text, made.label) if name and made.kind != "chats" and not inside}
    usable = profile.rows - profile.faults.counts.total()
    bad = profile.faults.counts.total() + sum(
        max(0, usable - one.present)
        + (0 if name in empty_labels else one.null + one.empty)
        + (0 if several else one.types["a list"])
        + one.types["an object"]
        + one.types["true or false"]
        for name, one in missing.items()
    )
    if usable < FEWEST_ROWS and (made.kind != "documents" or (options.base or NOTHING) != NOTHING):
        raise RecipeError(f"{data}: expected at least {FEWEST_ROWS} rows, to test on one of them, got {usable}")
    named = {name: getattr(options, name) for name in ("encoding", "delimiter", "sheet") if getattr(options, name)}
    return Rows(
        files=os.path.relpath(Path(data).expanduser().absolute(), path.parent.absolute()),
        kind=made.kind,
        prompt="" if inside else made.prompt,
        response=f"{{{made.label}}}" if made.kind in ("labels", "pairs") else "",
        text="" if inside or made.kind == "chats" else made.text,
        label=made.label if made.kind == "labels" else "",
        messages=made.text if made.kind == "chats" else "",
        is_known=is_known and made.kind != "labels",
        labels=tuple(values or ()),
        is_unequal=values is not None and len(values) > 1 and max(values.values()) > UNEQUAL * min(values.values()),
        several=several,
        count=usable if profile.rows < LOOKED_AT else max(usable, _estimate(profile)),
        characters=of_text.lengths.quantile(0.5) or 400,
        long_characters=of_text.lengths.quantile(0.95) or 800,
        bad=bad,
        read=named,
    )


def _estimate(profile: "Profile") -> int:
    """About how many rows there are, where only the first ones were read."""
    per_row = sum(one.lengths.quantile(0.5) + len(name) + 6 for name, one in profile.fields.items()) or 100
    return int(sum(path.stat().st_size for path in profile.files) / per_row)


def _show(data: str, profile: "Profile") -> None:
    """Prints the first rows."""
    more = "the first " if profile.rows == LOOKED_AT else ""
    print(f"{data}: {more}{profile.rows:,} rows with {', '.join(map(repr, profile.fields))}", file=sys.stderr)
    for name, encoding in profile.encodings.items():
        print(f"  {name} is read as {encoding}", file=sys.stderr)
    for row in profile.examples:
        cells = [f"{name}: {_brief(value)}" for name, value in row.items()]
        print("  " + " | ".join(cells), file=sys.stderr)
    for fault in profile.faults.as_json()[:3]:
        print(f"  cannot be used: {fault['rows']:,} rows, the first {fault['first']}: {fault['message']}", file=sys.stderr)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"


def _shipped(path: Path) -> str | None:
    """The folder with the text of Stockpot that the recipe names, relative to it; None where it did not come along."""
    if not (SHIPPED / "data").is_dir():
        return None
    return "data" if path.parent.resolve() == SHIPPED.resolve() else COPIES


def _write(path: Path, answers: Answers) -> list[Path]:
    """Writes the recipe if it is valid, and what it needs beside it; returns folders that it has to be allowed to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = path.parent.resolve()
    named = [(path.parent / answers.rows.files).resolve()] if answers.rows else []
    if answers.base and Path(answers.base).is_dir():
        named.append(Path(answers.base))
    outside = [one if one.is_dir() else one.parent for one in named if not one.is_relative_to(inside)]
    if answers.shipped == COPIES:
        _copy_shipped(path.parent / COPIES, answers.language)
    draft = path.with_name(f".{path.stem}.draft.toml")
    write_whole(draft, recipe_text(answers), durable=False)
    try:
        load_recipe(draft, allowed=outside)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(draft), str(path))) from error
    else:
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return list(dict.fromkeys(outside))


def _copy_shipped(folder: Path, language: str) -> None:
    """Copies the general text of a language, unless it is there."""
    folder.mkdir(exist_ok=True)
    languages = ("en", "zh") if language == "both" else ("zh",) if language == "zh" else ("en",)
    for pattern in [files[one] for one in languages for files in (GENERAL, HELD_OUT, CHAT)]:
        for source in (SHIPPED / "data").glob(pattern):
            if not (folder / source.name).exists():
                shutil.copyfile(source, folder / f".{source.name}")
                (folder / f".{source.name}").replace(folder / source.name)
    shutil.copyfile(SHIPPED / "data" / "NOTICE", folder / "NOTICE")


def _answer(given: str | None, question: str, default: str, check: Callable[[str], str | None], *, quiet: bool) -> str:
    """The value of the option, else the user's answer, else (without a terminal, or if nothing is to be asked) the default."""
    if given is not None or quiet or not sys.stdin.isatty():
        text = default if given is None else given
        if found := check(text):
            raise RecipeError(f"{question}: {found}")
        return text
    while True:
        text = input(f"{question} [{default}]: ").strip() or default
        found = check(text)
        if found is None:
            return text
        print(f"  {found}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one_of(text: str, choices: Sequence[str]) -> str | None:
    return None if text in choices else f"expected one of {', '.join(map(str, choices))}, got {text!r}"


def _is_data(text: str) -> str | None:
    from runner.input_files import InputFile

    path = Path(text).expanduser()
    if not text or path.is_file() or InputFile(str(path), Path.cwd()).matches():
        return None
    return f"expected a file, a glob, or a folder with files that can be read, got {text}"


def _language(text: str) -> str | None:
    return (
        None if re.fullmatch(r"[a-z]{2,3}|both", text) else f"expected a code of two or three letters, or both, got {text!r}"
    )


def _model(text: str) -> str | None:
    if text == NOTHING or Path(text).expanduser().is_dir() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        return None
    return f"expected {NOTHING}, owner/name of a model on the Hub, or a folder, got {text!r}"


def _minutes(text: str) -> str | None:
    try:
        return None if 0 < float(text) < 1e6 else f"expected more than 0, got {text}"
    except ValueError:
        return f"expected a number, got {text!r}"


def _repo(text: str) -> str | None:
    return None if not text or re.fullmatch(r"([\w.-]+/)?[\w.-]+", text) else f"expected owner/name, got {text!r}"
