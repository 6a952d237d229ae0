"""The kind `publish`: assembles the folder that is released, and pushes it once it is finished and a token is there.

    [stage.publish]
    kind = "publish"
    model = "release"                # safetensors, as Transformers opens them
    gguf = "gguf"                    # for llama.cpp and Ollama
    adapter = "medical"              # by itself in the folder `adapter`, for PEFT
    scores = ["before", "after"]

Nothing is published before the kind `parity` has found it the same wherever it is opened: a recipe that names no such stage
gets one, with what its other stages hold out to compare by. The folder is the artifact; pushing is an effect that receipts
decide on (`runner.hub`), so a run that only lacked a token repeats nothing.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from runner import hub
from runner.artifacts import Adapter, Artifact, Checkpoint, Corpus, Gguf, Parity, Release, Scores
from runner.graph import ancestors, edges, plain
from runner.stage import Context, Effect, Execution, Metrics, Ref, Semantic, Stage
from runner.stages.data import RowTable, RowTraining
from runner.stages.evaluate import Evaluate
from runner.stages.parity import CheckParity

A = TypeVar("A", bound=Artifact)
LOCKED = ("kind", "key", "digest", "files", "inputs", "code", "seconds", "processes", "versions", "hardware")


class Publish(Stage, kind="publish", version=2, makes=Release):
    """Assembles a release (weights, tokenizer, card, recipe, lock file, scores); pushes it to the Hub if `repo` is named."""

    model: Semantic[Ref[Checkpoint]]
    """What is released."""
    scores: Semantic[Annotated[list[Ref[Scores]], Field(default_factory=list)]]
    """Evaluations that the card shows, the released model's last; a gate that fails on any of them blocks the release."""
    gguf: Semantic[Ref[Gguf] | None] = None
    """GGUF files of the model, which go along."""
    adapter: Semantic[Ref[Adapter] | None] = None
    """An adapter that goes along by itself, in the folder `adapter`."""
    parity: Semantic[Ref[Parity] | None] = None
    """The comparison of the model in every system that opens it; by default a stage that is made for this one."""
    license: Semantic[str] = "other"
    """Licence of the model, as the Hub names it: "apache-2.0", "mit", "cc-by-4.0"."""
    languages: Semantic[list[str] | None] = None
    """ISO 639 codes for the card; by default those of the rows of the corpus."""
    repo: Execution[Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")] | None] = None
    """Where to push: "owner/name", or "name" for the owner of the token; without it nothing is pushed."""
    private: Execution[bool] = True
    """Whether a repository that has to be created is private."""

    def completed(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """With a stage `NAME-parity` where it names none."""
        if self.parity is not None:
            return {name: self}
        parity = next(free for number in count(1) if (free := f"{name}-parity" + f"-{number}" * (number > 1)) not in stages)
        complete: Publish = self.model_copy(update={"parity": _ref(Parity, parity)})
        return {name: complete, parity: self._parity(stages)}

    def _parity(self, stages: Mapping[str, Stage]) -> CheckParity:
        """Compares by what the stages above hold out: documents of corpora, rows of evaluations, or else of trainings."""
        above = [other for other in stages if other in ancestors(stages, self.model) | {self.model}]
        trainings = [stage for stage in map(stages.__getitem__, above) if isinstance(stage, RowTraining)]
        scored = [stage for stage in map(stages.get, self.scores) if isinstance(stage, Evaluate)]
        tables: list[RowTable] = [task for stage in scored for task in stage.tasks if isinstance(task, RowTable)]
        tables = tables or [table for stage in trainings for table in stage.validation or stage.data]
        bases = [] if self.adapter is None else [ref for _, ref in edges(stages[self.adapter]) if ref.wants is Checkpoint]
        rows = {(table.files.pattern, table.template): RowTable.model_construct(**_as_rows(table)) for table in tables}
        return CheckParity(
            model=self.model,
            gguf=self.gguf,
            base=bases[0] if bases else None,
            adapter=self.adapter if bases else None,
            corpora=[_ref(Corpus, other) for other in above if issubclass(stages[other].makes, Corpus)],
            prompts=list(rows.values()),
        )

    def run(self, context: Context) -> Metrics:
        """Fill the release folder."""
        from runner.card import Model, languages_of, model_card
        from runner.curves import draw

        release, checkpoint = Release(context.work), context.open(self.model)
        self._check_inputs(context)
        for path in checkpoint.content():
            _link_or_copy(path, context.work / path.relative_to(checkpoint.folder))
        for path in context.open(self.gguf).content() if self.gguf is not None else ():
            _link_or_copy(path, context.work / path.name)
        for path in context.open(self.adapter).content() if self.adapter is not None else ():
            _link_or_copy(path, release.adapter.folder / path.name)
        if self.parity is not None:
            _link_or_copy(context.open(self.parity).results, release.parity)
        recipe = tomllib.loads(context.recipe)
        records = {name: context.records[name] for name in recipe["stage"] if name in context.records}
        scores = {str(ref): json.loads(context.open(ref).scores.read_text(encoding="utf-8")) for ref in self.scores}
        release.recipe.write_text(context.recipe, encoding="utf-8")
        _write_json(release.scores, scores)
        _write_json(release.lock, {"recipe": recipe["name"], "stages": {name: _locked(records[name]) for name in records}})
        languages = languages_of(records.values()) if self.languages is None else self.languages
        curves = {name: record["curves"] for name, record in records.items() if record.get("curves")}
        if curves:
            draw(curves, release.curves)
        card = model_card(
            Model(
                recipe=recipe,
                publish=plain(self),
                records=records,
                scores={name: of_one["scores"] for name, of_one in scores.items()},
                license=self.license,
                languages=languages,
                version=records[self.model]["versions"].get("stockpot", ""),
            )
        )
        release.card.write_text(card, encoding="utf-8")
        files = _files(release)
        return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "languages": languages}

    def _check_inputs(self, context: Context) -> None:
        """What is released with the model has to be of this model."""
        from llm.errors import InputError

        def sources(ref: str) -> set[str]:
            return {source["digest"] for source in context.records[ref].get("inputs", {}).values()}

        model = context.records[self.model]["digest"]
        released = {str(ref): context.records[ref]["digest"] for ref in (self.gguf, self.adapter) if ref is not None}
        if self.gguf is not None and model not in sources(self.gguf):
            raise InputError(f"gguf: wants files of what {str(self.model)!r} made; {str(self.gguf)!r} wrote another model")
        if self.parity is not None:
            for name, digest in {str(self.model): model, **released}.items():
                if digest not in sources(self.parity):
                    raise InputError(f"parity: wants {name!r} compared before it is released; {str(self.parity)!r} did not")

    def effect(self, artifact: Path, *, digest: str, receipts: Path) -> Effect | None:
        """The push, unless a receipt says it is done."""
        if self.repo is None:
            return None
        target = hub.Target(self.repo, endpoint=hub.endpoint())
        if hub.read_receipt(receipts, target, digest):
            return None
        if hub.token() is None:
            return Effect(f"the release is in {artifact}; {hub.how_to_push(target)}", None)
        act = partial(_push, artifact, target, private=self.private, digest=digest, receipts=receipts)
        return Effect(f"pushes to {target}", act)


def _push(folder: Path, target: hub.Target, *, private: bool, digest: str, receipts: Path) -> str:
    files = {path.relative_to(folder).as_posix(): path for path in _files(Release(folder))}
    return f"pushed: {hub.push(folder, target, files=files, private=private, digest=digest, receipts=receipts)}"


def _files(release: Release) -> list[Path]:
    """What is pushed: the content, and what is told about it."""
    return [*release.content(), release.card, release.lock, *([release.curves] if release.curves.exists() else [])]


def _locked(record: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(_data(record.get("identity", {}).get("fields", {})))
    return {name: record[name] for name in LOCKED if name in record} | ({"data": data} if data else {})


def _data(value: Any, field: str = "") -> Iterator[tuple[str, list[str]]]:
    """sha256 of the files that a stage reads from outside, by the field that names them."""
    match value:
        case {"content": files}:
            yield field, [digest for _, digest in files]
        case dict():
            for name, item in value.items():
                yield from _data(item, f"{field}.{name}".removeprefix("."))
        case list():
            for index, item in enumerate(value):
                yield from _data(item, f"{field}[{index}]")


def _as_rows(table: RowTable) -> dict[str, Any]:
    """The fields that every table of rows has; rows that cannot be used are passed over."""
    return {name: getattr(table, name) for name in RowTable.model_fields} | {"on_bad_row": "skip"}


def _ref(wants: type[A], name: str) -> Ref[A]:
    ref: Ref[A] = Ref(name)
    ref.wants = wants
    return ref


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them: artifacts are never changed in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
