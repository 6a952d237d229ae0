"""`run check DATA...`: what files of data hold, what of them cannot be used, and what a recipe would make of them."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runner.errors import RecipeError
from runner.input_files import InputFile
from runner.planning.text_table import text_table

CONTEXTS = (256, 512, 1024, 2048, 4096)  # positions that lengths are compared with
CHARACTERS = 3  # about so many are a token, in a language with spaces, where no tokenizer is named
SHOWN_CLASSES, SHOWN_FAULTS = 12, 20
IMBALANCE = 10  # times more rows of the most frequent class than of the rarest one
MOST_LANGUAGES = 8  # that are named
WIDEST = 60  # characters of a value that are shown


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument("data", nargs="+", metavar="DATA", help="files, globs or folders of data, or recipes with their tables")
    sub.add_argument("--tokenizer", type=Path, metavar="PATH", help="a tokenizer.json, or its folder: lengths are in tokens")
    sub.add_argument("--encoding", metavar="NAME", help="of text files, instead of the one that is found")
    sub.add_argument("--delimiter", metavar="CHARACTER", help="of .csv files, instead of the one that is found")
    sub.add_argument("--sheet", metavar="NAME", help="of workbooks, instead of the first")
    sub.add_argument("--rows", type=int, metavar="N", help="read at most so many")
    sub.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Tells what data holds: fields, lengths, classes, duplicates, languages, personal data, and rows that cannot be used."""
    recipes = [Path(name) for name in options.data if name.endswith(".toml")]
    names = [name for name in options.data if not name.endswith(".toml")]
    found = {str(path): _recipe_faults(path) for path in recipes}
    report = _profile(names, options) if names else {}
    if options.json:
        print(json.dumps({**report, **({"recipes": found} if recipes else {})}, indent=2, ensure_ascii=False, default=str))
    else:
        for line in [*(_lines(report) if report else []), *_recipe_lines(found)]:
            print(line)
    return 2 if any(found.values()) or (report and not report["rows"]) else 0


def read_profile(names: Sequence[str], options: argparse.Namespace, **settings: Any) -> Any:
    """The `Profile` of files, globs and folders as the options say to read them; RecipeError if there are none."""
    from llm.text.profile import profile
    from llm.text.readers import FileFormat

    files = list(dict.fromkeys(path for name in names for path in _files(name)))
    form = FileFormat(encoding=options.encoding, delimiter=options.delimiter, sheet=options.sheet)
    try:
        "".encode(form.encoding or "utf-8")
    except LookupError:
        raise RecipeError(f"--encoding: expected one that Python knows, such as gb18030, got {form.encoding!r}") from None
    return profile(files, form, **settings)


def _files(name: str) -> list[Path]:
    """The files that a path, glob or folder means."""
    path = Path(name).expanduser()
    found = [path] if path.is_file() else InputFile(str(path), Path.cwd()).matches()
    if not found:
        raise RecipeError(f"{name}: expected a file, a glob, or a folder with files that can be read, got none")
    return found


def _profile(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The report as plain data."""
    from llm.text.profile.guess import guess

    found = read_profile(names, options, most_rows=options.rows, tokens=_counter(options.tokenizer))
    report: dict[str, Any] = found.as_json()
    lengths, unit = (found.lengths, 1) if options.tokenizer else (_longest_field(found), CHARACTERS)
    report["longer_than"] = {str(context): lengths.over(unit * context) for context in CONTEXTS}
    if made := guess(found):
        report["use"] = {"kind": made.kind, "text": made.text, "label": made.label, "why": made.why}
    return report


def _longest_field(found: Any) -> Any:
    from llm.text.profile import Lengths

    fields = found.fields.values()
    return max((field.lengths for field in fields), key=lambda lengths: lengths.quantile(0.5), default=Lengths())


def _counter(path: Path | None) -> Callable[[list[str]], list[int]] | None:
    """Counts tokens with the tokenizer at `path`."""
    if path is None:
        return None
    from llm.errors import InputError
    from llm.tokenizer.files import TOKENIZER_FILE, open_tokenizer

    try:
        tokenizer = open_tokenizer(path / TOKENIZER_FILE if path.is_dir() else path)
    except InputError as error:
        raise RecipeError(f"--tokenizer: {error}") from error
    return lambda texts: [len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _recipe_faults(path: Path) -> list[str]:
    """What is wrong in the rows of all tables of a recipe."""
    from runner.planning.data_look import data_tables, look
    from runner.recipe.recipe import load_recipe

    stages = load_recipe(path).stages
    return [
        f"{table.place}: {fault.sentence}" for name in stages for table in data_tables(name, stages) for fault in look(table)
    ]


def _recipe_lines(found: dict[str, list[str]]) -> Iterator[str]:
    for path, faults in found.items():
        yield f"{path}: {'every table can be used, as far as was looked' if not faults else 'faults'}"
        yield from (f"  {fault}" for fault in faults)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    bad = sum(fault["rows"] for fault in report["faults"])
    yield f"{_count(len(report['files']), 'file')} ({', '.join(report['formats'])}), {_count(report['rows'], 'row')}"
    for name, encoding in report["encodings"].items():
        yield f'  {name} is read as {encoding}; if that is wrong, name it: read = {{ encoding = "..." }}'
    yield ""
    yield from text_table(
        [
            ["field", "values", "empty", "types", "characters: half up to", "95% up to", "longest"],
            *(_field_cells(name, one, report["rows"] - bad) for name, one in report["fields"].items()),
        ]
    )
    yield ""
    for name, one in report["fields"].items():
        yield from _classes(name, one["values"])
    if report["duplicates"]:
        yield f"duplicates: {_count(report['duplicates'], 'row')} equal to an earlier one"
    shown = [f"{name} {count:,}" for name, count in itertools.islice(report["languages"].items(), MOST_LANGUAGES)]
    more = [f"{len(report['languages']) - MOST_LANGUAGES} more"] if len(report["languages"]) > MOST_LANGUAGES else []
    yield "languages of the rows, as far as their text tells: " + ", ".join(shown + more)
    yield from _length_lines(report)
    for kind, where in report["personal_data"].items():
        yield (
            f"perhaps personal data: {_count(where['texts'], 'text')} with {_a(kind)}, the first in {where['field']!r} of "
            f"{where['first']} (a hint, by pattern)"
        )
    for fault in report["faults"][:SHOWN_FAULTS]:
        yield f"cannot be used: {_count(fault['rows'], 'row')}, the first {fault['first']}: {fault['message']}"
    yield from _use_lines(report.get("use"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def _field_cells(name: str, one: dict[str, Any], rows: int) -> list[str]:
    characters = one["characters"]
    empty = one["null"] + one["empty"] + rows - one["present"]
    share = f" ({100 * empty / rows:.0f}%)" if empty and rows else ""
    lengths = [f"{characters[key]:,}" for key in ("p50", "p95", "max")]
    return [name[:WIDEST], f"{one['present'] - one['null']:,}", f"{empty:,}{share}", ", ".join(one["types"]), *lengths]


def _classes(name: str, values: dict[str, int] | None) -> Iterator[str]:
    """The values of a field that may be classes, and whether they are balanced."""
    if not values or not 2 <= len(values) <= sum(values.values()) / 2:
        return
    total = sum(values.values())
    shown = [f"{value[:WIDEST]!r} {count:,} ({100 * count / total:.0f}%)" for value, count in values.items()]
    more = f", and {len(shown) - SHOWN_CLASSES} more" if len(shown) > SHOWN_CLASSES else ""
    yield f"{name!r} has {len(values)} values: {', '.join(shown[:SHOWN_CLASSES])}{more}"
    if max(values.values()) > IMBALANCE * min(values.values()):
        yield (
            f"  the most frequent one has {max(values.values()) / min(values.values()):.0f} times the rows of the rarest: "
            "look at macro-F1, not at accuracy"
        )


def _length_lines(report: dict[str, Any]) -> Iterator[str]:
    if tokens := report.get("tokens"):
        yield f"tokens: half of the rows up to {tokens['p50']:,}, 95% up to {tokens['p95']:,}, the longest {tokens['max']:,}"
    over = [f"{count:,} than {context} tokens" for context, count in report["longer_than"].items() if count]
    if over:
        about = "" if "tokens" in report else f" ({CHARACTERS} characters counted as a token; --tokenizer counts them)"
        yield f"rows that are longer than a context{about}: {', '.join(over)}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aei' else 'a'} {noun}"


def _use_lines(use: dict[str, str] | None) -> Iterator[str]:
    if use is None:
        yield "no field holds text that a recipe could use"
        return
    fields = {
        "labels": f"{use['text']!r} with the label {use['label']!r}",
        "pairs": f"{use['text']!r} answered by {use['label']!r}",
    }
    yield f"a recipe would take it as {use['kind']}: {fields.get(use['kind'], repr(use['text']))}"
    if use["why"]:
        print(use["why"], file=sys.stderr)
    yield "  run new FILE --data DATA writes it"
