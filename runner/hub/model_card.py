"""The model card of a release: what the model is, its data, its scores, how to use it and how to reproduce it.

It is written from the records of the stages and the scores alone. It does not name the target of the push, which may change
without a new release.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.hub.class_scores import class_scores
from runner.hub.files import SCHEME, HubFiles
from runner.hub.languages import language_of
from runner.hub.model_card_usage import usage
from runner.stage import Verdict

Record = Mapping[str, Any]

# Score names of `evaluate` -> metric names of the Hub.
HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "perplexity": "perplexity", "bleu": "bleu", "chrf": "chrf"}
MANY = 12  # sources of one stage that are listed one by one


@dataclass(frozen=True)
class Model:
    """The facts for a model card."""

    recipe: Mapping[str, Any]  # resolved
    records: Mapping[str, Record]  # by stage, in the order of the recipe
    scores: Mapping[str, Mapping[str, float]]  # by evaluation, the released model's last
    license: str  # an identifier of the Hub, such as "apache-2.0"; "other" where there is none
    languages: Sequence[str]  # ISO 639 codes
    version: str  # of stockpot; "" where it is not installed as a package
    publish: Mapping[str, Any] = field(default_factory=dict)  # fields of the stage that releases
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)  # by evaluation
    settings: Sequence[Sequence[str]] = ()  # of a sweep whose best one this is: a header and one row per setting


def model_card(model: Model) -> str:
    """The whole README.md: YAML metadata, then Markdown."""
    sections = [
        f"---\n{_metadata(model)}\n---\n",
        f"# {model.recipe['name']}\n",
        f"{model.recipe['description']}\n" if model.recipe.get("description") else "",
        _summary(model),
        _scores(model),
        _settings(model.settings),
        usage(model.recipe, model.records, model.publish),
        _parity(model),
        _data(model),
        _curves(model.records),
        _making(model.records),
        _again(model.version),
    ]
    return "\n".join(section for section in sections if section)


def languages_of(records: Iterable[Record]) -> list[str]:
    """The languages of a model's corpora, most frequent first."""
    counts: Counter[str] = Counter()
    for source in _sources(records):
        counts.update(source.get("languages", {}))
    found = (language_of(language) for language, _ in counts.most_common())
    return list(dict.fromkeys(code for code in found if code))  # the Hub refuses a card with another


def _sources(records: Iterable[Record]) -> Iterator[Mapping[str, Any]]:
    for record in records:
        yield from record["metrics"].get("sources", {}).values()


def _metadata(model: Model) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # 0.1 s, and only where a card is written

    final = list(model.scores.values())[-1] if model.scores else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.partition(".")[0],
            dataset_name=score.partition(".")[0],
            metric_type=HUB_METRICS.get(metric := score.rpartition(".")[2], metric),
            metric_name=score,
            metric_value=value,
        )
        for score, value in final.items()
    ]
    data = ModelCardData(
        language=list(model.languages) or None,
        license=model.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["stockpot", *(tag for tag, name in (("gguf", "gguf"), ("lora", "adapter")) if model.publish.get(name))],
        base_model=[base.name for base in _bases(model.recipe, model.records) if base.name] or None,
        datasets=sorted(_datasets(model)) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=model.recipe["name"] if results else None,
    )
    return data.to_yaml()


def _datasets(model: Model) -> set[str]:
    """The Hub datasets that the model was trained on."""
    corpora = {source["hub"] for source in _sources(model.records.values()) if "hub" in source}
    tables = [
        table
        for stage in model.records
        for name in ("sources", "data", "mix")
        for table in model.recipe["stage"].get(stage, {}).get(name, ())
    ]
    addresses = [str(table.get("files", "")) for table in tables]
    return corpora | {HubFiles.parse(address).repo for address in addresses if address.startswith(SCHEME)}


def _place(files: str) -> str:
    """Files as the recipe names them, with a link to those on the Hub."""
    if not files.startswith(SCHEME):
        return _plain(files)
    on_hub = HubFiles.parse(files)
    page = f"https://huggingface.co/datasets/{on_hub.repo}/tree/{on_hub.commit}"
    return f"[{on_hub.repo}]({page}): {on_hub.path}, commit `{on_hub.commit[:12]}`"


def _imported(records: Mapping[str, Record]) -> list[Record]:
    """The records of imported checkpoints."""
    return [record for record in records.values() if record["kind"] == "checkpoint"]


@dataclass(frozen=True)
class Base:
    """A model that was made elsewhere, on which this one is built."""

    name: str | None  # on the Hub
    commit: str | None
    license: str | None


def _bases(recipe: Mapping[str, Any], records: Mapping[str, Record]) -> list[Base]:
    found = []
    for stage, record in records.items():
        if record["kind"] == "checkpoint":
            fields, metrics = recipe["stage"].get(stage, {}), record["metrics"]
            found.append(Base(metrics.get("repo") or fields.get("model_id"), metrics.get("commit"), fields.get("license")))
    return found


def base_license(recipe: Mapping[str, Any], records: Mapping[str, Record]) -> str | None:
    """The licence of what the model is built on, where the recipe names it."""
    return next((base.license for base in reversed(_bases(recipe, records)) if base.license), None)


def _adapted_from(base: Base, license: str) -> str:
    """The base, its licence, and a warning if the release has another."""
    if base.name is None:
        origin = "Adapted from a model that was made elsewhere"
    else:
        commit = f", commit `{base.commit[:12]}`" if base.commit else ""
        origin = f"Adapted from [{base.name}](https://huggingface.co/{base.name}){commit}"
    if base.license is None:
        return f"{origin}.\n"
    other = (
        "" if base.license == license else f", this release under {license}: whether that is allowed is for its makers to say"
    )
    return f"{origin}, which is under {base.license}{other}.\n"


def _summary(model: Model) -> str:
    """The base model of an adapted one, or the size of one trained from scratch."""
    if bases := _bases(model.recipe, model.records):
        return _adapted_from(bases[-1], model.license)
    trainings = [stage for stage, record in model.records.items() if record["kind"] == "pretrain"]
    if not trainings:
        return ""
    fields, metrics = model.recipe["stage"][trainings[-1]], model.records[trainings[-1]]["metrics"]
    shape = fields.get("architecture", {})
    context = shape.get("context") or model.recipe["stage"].get(fields.get("tokens"), {}).get("context")
    vocabularies = [record["metrics"]["vocab_size"] for record in model.records.values() if record["kind"] == "tokenizer"]
    facts = [
        f"{metrics['parameters']:,} parameters" if "parameters" in metrics else "",
        f"{shape['layers']} layers" if "layers" in shape else "",
        f"hidden size {shape['hidden_size']:,}" if "hidden_size" in shape else "",
        f"a vocabulary of {vocabularies[-1]:,} tokens" if vocabularies else "",
        f"a context of {context:,} tokens" if context else "",
    ]
    size = ", ".join(fact for fact in facts if fact)
    family = shape.get("name", "llama")
    return f"A {'LLaMA' if family == 'llama' else family} decoder trained from nothing{': ' if size else ''}{size}.\n"


def _scores(model: Model) -> str:
    scores = model.scores
    if not scores:
        return ""
    names = list(dict.fromkeys(score for of_one in scores.values() for score in of_one))
    rows = [[score, *(_score(model, name, score) for name in scores)] for score in names]
    return f"""## Scores

{_table(["score", *scores], rows)}
Perplexity, bits per byte and the calibration error `ece` are better when lower, everything else when higher.
In brackets: the 95% interval of a bootstrap
over the examples.
{_tasks(model)}{_by_class(model)}{_gates(model)}"""


def _by_class(model: Model) -> str:
    """The scores of each label of the last evaluation, and which labels are taken for which."""
    found = ""
    for one in class_scores(model.records[list(model.scores)[-1]]["metrics"]):
        head, *rows = ([_plain(cell) for cell in line] for line in one.classes)
        found += f"\nBy class of `{one.task}`:\n\n{_table(head, rows)}"
        if one.confusion:
            head, *rows = ([_plain(cell) for cell in line] for line in one.confusion_table)
            found += f"\nRows by expected label (down) and chosen label (across):\n\n{_table(head, rows)}"
    return found


def _score(model: Model, evaluation: str, score: str) -> str:
    interval = model.records[evaluation]["metrics"].get("intervals", {}).get(score)
    ends = f" [{', '.join(map(number, interval))}]" if interval else ""
    return number(model.scores[evaluation].get(score)) + ends


def _gates(model: Model) -> str:
    """The gates of the recipe and their outcomes."""
    rows = [
        [evaluation, verdict.gate, verdict.found, {True: "passed", False: "failed", None: ""}[verdict.passed]]
        for evaluation, verdicts in model.verdicts.items()
        for verdict in verdicts
    ]
    return f"\nThe gates of this release:\n\n{_table(['scores', 'wanted', 'found', 'outcome'], rows)}" if rows else ""


def _settings(settings: Sequence[Sequence[str]]) -> str:
    """The settings of a sweep, with the best one marked."""
    if not settings:
        return ""
    head, *rows = settings
    return f"## Settings that were compared\n\nThe one marked as best was released.\n\n{_table(head, rows)}"


def _tasks(model: Model) -> str:
    """Which models were scored, and the data of the last evaluation."""
    stages, last = model.recipe["stage"], list(model.scores)[-1]
    counts = model.records[last]["metrics"].get("tasks", {})
    rows = [
        [task["name"], task["task"], _place(task["files"]), f"{counts[task['name']]['rows']:,}"]
        for task in stages[last].get("tasks", ())
    ]
    scored = [
        f"`{name}` scores what the stage `{stages[name]['model']}` made." for name in model.scores if "model" in stages[name]
    ]
    return f"{' '.join(scored)}\n\n{_table(['scores', 'task', 'data', 'rows'], rows)}" if rows else ""


def _parity(model: Model) -> str:
    """The outcomes of the parity checks, including those that could not run."""
    stage = model.publish.get("parity")
    checks = model.records[stage]["metrics"]["checks"] if stage else ()
    words = {True: "equal", False: "not equal", None: "not checked"}
    rows = [[check["name"], words[check["passed"]], check["told"]] for check in checks]
    if not rows:
        return ""
    return f"""## The same everywhere

Before it was released, the model was opened in other systems and compared with the model as it was trained, in fp32:

{_table(["compared", "outcome", "found"], rows)}"""


def _curves(records: Mapping[str, Record]) -> str:
    drawn = any(record.get("curves") for record in records.values())
    return "## Curves\n\n![Loss of each training by step](curves.png)\n" if drawn else ""


def _data(model: Model) -> str:
    rows = [
        row
        for stage, record in model.records.items()
        for row in learned_from(stage, record, model.recipe["stage"].get(stage, {}))
    ]
    if not rows:
        return ""
    before = "What its base had learned is for the base's own card to tell; nobody"
    beyond = before if _imported(model.records) else "It knows nothing but this, and nobody"
    return (
        "## Data\n\nWhat the model learned from, by stage, with the number of rows of each licence and origin:\n\n"
        + _table(["stage", "data", "rows", "licences", "origins"], rows)
        + f"\n{beyond} has checked its answers: what it says may be wrong.\n"
    )


def learned_from(stage: str, record: Record, fields: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row per source of a corpus and per table of a fine-tuning: stage, data, rows, licences, origins."""
    metrics = record["metrics"]
    for number, spec in enumerate(fields.get("sources", ()), start=1):
        name = spec.get("name") or spec.get("hub") or f"source-{number}"
        source = metrics["sources"][name]
        place = (
            f"[{name}](https://huggingface.co/datasets/{source['hub']})"
            if "hub" in source
            else f"{name}: {_place(spec['files'])}"
        )
        used = f"{source['train']:,}" + (f" + {source['validation']:,} held out" if source["validation"] else "")
        yield [stage, place, used, _listed(source["licenses"]), _listed(source["origins"])]
    mixed = [one.get("table") for one in metrics.get("mix", ())]  # for tokens, the row of the corpus says it
    shares = [float(one["share"]) for one in metrics.get("mix", ())]
    own = metrics.get("data", {}).get("tables", ())
    learned = sum(table.get("learned_tokens", 0) for table in own)
    parts = [(table, spec, learned, 1 - sum(shares)) for table, spec in zip(own, fields.get("data", ()), strict=False)]
    parts += [
        (table, spec, table.get("learned_tokens", 0), share)
        for table, spec, share in zip(mixed, fields.get("mix", ()), shares, strict=False)
        if table
    ]
    for table, spec, tokens, share in parts:
        rows = table["rows"] - table["bad"] - table.get("unselected", 0) - table["dropped"]
        if used := _used(rows, tokens, metrics.get("tokens", 0) * share):
            yield [stage, _place(spec["files"]), used, _listed(table.get("licenses", {})), _listed(table.get("origins", {}))]


def _used(rows: int, tokens: int, learned: float) -> str:
    """How many of `rows` with `tokens` targets a training that learned from `learned` of them has read; empty if none."""
    if not tokens or not learned or learned >= tokens:
        return f"{rows:,}"
    return f"about {count:,} of {rows:,}" if (count := round(rows * learned / tokens)) else ""


def _listed(counts: Mapping[str, int]) -> str:
    """Names with counts, most frequent first; the tail of a long list as a number."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{_plain(name)} ({count:,})" for name, count in ordered[:MANY]]
    if ordered[MANY:]:
        shown.append(f"{len(ordered) - MANY} more ({sum(count for _, count in ordered[MANY:]):,})")
    return ", ".join(shown) or "not stated"


def _plain(text: str) -> str:
    """A text of rows in Markdown: no link, picture or HTML."""
    return re.sub(r"([\\`\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _making(records: Mapping[str, Record]) -> str:
    rows = [
        [
            stage,
            str(record["kind"]),
            _work(record["metrics"]),
            _seconds(float(record["seconds"])),
            f"`{str(record['digest'])[:12]}`",
        ]
        for stage, record in records.items()
    ]
    return "## How it was made\n\n" + _table(["stage", "kind", "work", "time", "result"], rows)


def _work(metrics: Mapping[str, Any]) -> str:
    """The amount of training, of a stage that trains."""
    if "trained_parameters" not in metrics:
        return ""
    return (
        f"{metrics['trained_parameters']:,} parameters learned from {metrics['tokens']:,} tokens in {metrics['steps']:,} steps"
    )


def _again(version: str) -> str:
    return f"""## Make it again

`recipe.toml` is the whole recipe, with every default written out, and `recipe.lock.json` holds the digests, versions and
hardware of this run. Put `recipe.toml` where the data files are that it names, and with {f"Stockpot {version}".strip()}:

```
run recipe.toml
```
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def number(value: float | None) -> str:
    """A score for a table; empty if there is none."""
    return "" if value is None else f"{value:.4g}"


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
