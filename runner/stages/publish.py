"""The kind `publish`: assembles the folder that is released, and pushes it once it is finished and a token is there.

The folder is the artifact; pushing is an effect that receipts decide on (`runner.hub`), so a run that only lacked a token
repeats nothing.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from runner import hub
from runner.artifacts import Checkpoint, Release, Scores
from runner.graph import inputs_of
from runner.stage import Context, Effect, Execution, Lineage, Metrics, Ref, Semantic, Stage, Verdict

LOCKED = ("kind", "key", "digest", "files", "inputs", "code", "seconds", "processes", "versions", "hardware")


class Publish(Stage, kind="publish", version=1, makes=Release):
    """Assembles a release (weights, tokenizer, card, recipe, lock file, scores); pushes it to the Hub if `repo` is named."""

    model: Semantic[Ref[Checkpoint]]
    """What is released."""
    scores: Semantic[Annotated[list[Ref[Scores]], Field(default_factory=list)]]
    """Evaluations that the card shows, the released model's last; a gate that fails on any of them blocks the release."""
    license: Semantic[str] = "other"
    """Licence of the model, as the Hub names it: "apache-2.0", "mit", "cc-by-4.0"."""
    languages: Semantic[list[str] | None] = None
    """ISO 639 codes for the card; by default those of the rows of the corpus."""
    repo: Execution[Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")] | None] = None
    """Where to push: "owner/name", or "name" for the owner of the token; without it nothing is pushed."""
    private: Execution[bool] = True
    """Whether a repository that has to be created is private."""

    def run(self, context: Context) -> Metrics:
        """Fill the release folder."""
        from runner.card import Model, languages_of, model_card

        release, checkpoint = Release(context.work), context.open(self.model)
        for path in checkpoint.content():
            _link_or_copy(path, context.work / path.relative_to(checkpoint.folder))
        recipe = tomllib.loads(context.recipe)
        records = {name: context.records[name] for name in recipe["stage"] if name in context.records}
        scores = {str(ref): json.loads(context.open(ref).scores.read_text(encoding="utf-8")) for ref in self.scores}
        release.recipe.write_text(context.recipe, encoding="utf-8")
        _write_json(release.scores, scores)
        _write_json(release.lock, {"recipe": recipe["name"], "stages": {name: _locked(records[name]) for name in records}})
        languages = languages_of(records.values()) if self.languages is None else self.languages
        card = model_card(
            Model(
                recipe=recipe,
                records=records,
                scores={name: of_one["scores"] for name, of_one in scores.items()},
                license=self.license,
                languages=languages,
                version=records[self.model]["versions"].get("stockpot", ""),
                verdicts=_verdicts(recipe["stage"], records, [name for name in scores if recipe["stage"][name].get("gates")]),
            )
        )
        release.card.write_text(card, encoding="utf-8")
        files = _files(release)
        return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "languages": languages}

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


def _verdicts(
    tables: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]], judged: Sequence[str]
) -> dict[str, Sequence[Verdict]]:
    """What came of the gates of each evaluation in `judged`."""
    from runner.recipe import stage_kinds

    if not judged:
        return {}
    fields = {name: {key: value for key, value in table.items() if key != "kind"} for name, table in tables.items()}
    stages = {name: stage_kinds()[tables[name]["kind"]].model_validate(fields[name]) for name in tables}
    lineage = Lineage(inputs_of(stages), records)
    return {name: stages[name].verdicts(records[name]["metrics"], lineage) for name in judged}


def _push(folder: Path, target: hub.Target, *, private: bool, digest: str, receipts: Path) -> str:
    files = {path.relative_to(folder).as_posix(): path for path in _files(Release(folder))}
    return f"pushed: {hub.push(folder, target, files=files, private=private, digest=digest, receipts=receipts)}"


def _files(release: Release) -> list[Path]:
    """What is pushed: the content, and what is told about it."""
    return [*release.content(), release.card, release.lock]


def _locked(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in LOCKED if name in record}


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
