"""The kind `publish`: assembles the folder that is released, and pushes it once it is finished and a token is there.

The folder is the artifact; pushing is an effect that receipts decide on (`runner.hub`), so a run that only lacked a token
repeats nothing.
"""

import json
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from runner import hub
from runner.artifacts import Checkpoint, Release, Scores
from runner.files import link_or_copy
from runner.receipts import Journal
from runner.stage import Acting, Context, Effect, Execution, Metrics, Ref, Semantic, Stage

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
    branch: Execution[Annotated[str, Field(pattern=r"^\w[\w./-]*$")]] = "main"
    """Branch to push to; one that is not there begins at main."""
    pull_request: Execution[bool] = False
    """Whether to open a pull request to main, instead of pushing to a branch."""
    tag: Execution[Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None] = None
    """A tag for the commit, such as "v1"; a new release wants a new one."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.pull_request and self.branch != "main":
            raise ValueError(f"a pull request goes to main; wants pull_request or branch, found both ({self.branch!r})")
        if self.pull_request and self.tag is not None:
            raise ValueError(f"a pull request is not released yet; wants pull_request or tag, found both ({self.tag!r})")
        return self

    @property
    def target(self) -> hub.Target | None:
        """Where to push."""
        if self.repo is None:
            return None
        return hub.Target(self.repo, branch=self.branch, endpoint=hub.endpoint(), pull_request=self.pull_request)

    def run(self, context: Context) -> Metrics:
        """Fill the release folder."""
        from runner.card import Model, languages_of, model_card

        release, checkpoint = Release(context.work), context.open(self.model)
        for path in checkpoint.content():
            link_or_copy(path, context.work / path.relative_to(checkpoint.folder))
        recipe = tomllib.loads(context.recipe)
        records = {name: context.records[name] for name in recipe["stage"] if name in context.records}
        scores = {str(ref): json.loads(context.open(ref).scores.read_text(encoding="utf-8")) for ref in self.scores}
        release.recipe.write_text(context.recipe, encoding="utf-8")
        _write_json(release.scores, scores)
        _write_json(
            release.lock,
            {
                "recipe": recipe["name"],
                "stages": {name: _locked(records[name], context.data.get(name, {})) for name in records},
            },
        )
        languages = languages_of(records.values()) if self.languages is None else self.languages
        card = model_card(
            Model(
                recipe=recipe,
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

    def effect(self, artifact: Path, *, digest: str, receipts: Path) -> Effect | None:
        """The push, unless a receipt says it is done."""
        target = self.target
        if target is None:
            return None
        journal = Journal.read(receipts, target)
        if pushes := journal.pushes_of(digest):
            if journal.last is not None and journal.last.digest != digest:
                now = f"{target} holds another release since {journal.last.time}"
                return Effect(f"was pushed before, but {now}; `run publish` puts this one there again", None)
            if self.tag is None or self.tag in {push.tag for push in pushes}:
                return None
        if hub.token() is None:
            return Effect(f"the release is in {artifact}; {hub.how_to_push(target)}", None)
        act = partial(self.push, artifact, digest, receipts)
        return Effect(f"tags what {target} holds" if pushes else f"pushes to {target}", act)

    def push(self, artifact: Path, digest: str, receipts: Path, acting: Acting) -> str:
        """Push the release, whatever the receipts say; returns a sentence with its address."""
        from runner.hub_push import Order, push
        from runner.retries import Retries

        assert self.target is not None
        files = {path.relative_to(artifact).as_posix(): path for path in _files(Release(artifact))}
        order = Order(artifact, files, digest, self.target, private=self.private, tag=self.tag)
        retries = Retries(sleep=acting.sleep, note=acting.note)
        return f"pushed: {push(order, receipts=receipts, overwrite=acting.overwrite, retries=retries).url}"


def _files(release: Release) -> list[Path]:
    """What is pushed: the content, and what is told about it."""
    return [*release.content(), release.card, release.lock]


def _locked(record: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What the lock file tells of a stage; `data` are its input files."""
    locked = {name: record[name] for name in LOCKED if name in record}
    return locked | ({"data": data} if data else {})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
