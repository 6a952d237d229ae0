"""The kind `publish`: assembles the release folder, and pushes it to the Hub if there is a token.

    [stage.publish]
    kind = "publish"
    model = "release"                # safetensors, as Transformers opens them
    gguf = "gguf"                    # for llama.cpp and Ollama
    adapter = "medical"              # in the folder `adapter`, for PEFT
    scores = ["before", "after"]

Nothing is published before the kind `parity` has compared it in every system that opens it: a recipe without such a stage gets
one, with the held-out data of its other stages. The folder is the artifact. Pushing is an effect, and receipts (`runner.hub`)
say whether it was done, so a run that only lacked a token repeats no work.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from runner import credentials
from runner.artifacts import Adapter, Checkpoint, Corpus, Gguf, Parity, Release, Scores, TrainingState
from runner.files import link_or_copy
from runner.graph import ancestors, edges, inputs_of, plain
from runner.hub.languages import is_language
from runner.hub.receipts import Journal
from runner.hub.target import Target, how_to_push, repository_name
from runner.stage import Context, Effect, EffectContext, Execution, Lineage, Metrics, Ref, Semantic, Stage, Verdict
from runner.stages.evaluate import Evaluate
from runner.stages.fields.chat_training import RowTraining
from runner.stages.fields.data_tables import RowTable
from runner.stages.parity import CheckParity

LOCKED = ("kind", "key", "digest", "files", "inputs", "code", "seconds", "processes", "versions", "hardware")


def _language(code: str) -> str:
    if not is_language(code):
        raise ValueError(f'expected an ISO 639 code that the Hub takes, such as "en" or "zh", got {code!r}')
    return code


class Publish(Stage, kind="publish", version=4, makes=Release):
    """Assembles a release (weights, tokenizer, card, recipe, lock file, scores); pushes it to the Hub if `repo` is named."""

    holds_recipe = True
    user_fields = ("repo", "private", "branch", "pull_request", "tag")

    model: Semantic[Ref[Checkpoint]]
    """The model to release."""
    scores: Semantic[Annotated[list[Ref[Scores]], Field(default_factory=list)]]
    """Evaluations for the card, that of the released model last; a failed gate of any of them blocks the release."""
    gguf: Semantic[Ref[Gguf] | None] = None
    """GGUF files of the model to release with it."""
    adapter: Semantic[Ref[Adapter] | None] = None
    """An adapter to release with it, in the folder `adapter`."""
    parity: Semantic[Ref[Parity] | None] = None
    """The comparison of the model in every system that opens it; by default a stage that is added for it."""
    license: Semantic[str | None] = None
    """Licence of the model, by its name on the Hub: "apache-2.0", "mit", "cc-by-4.0". By default that of its base where the
    stage `checkpoint` names one, else "other"."""
    languages: Semantic[list[Annotated[str, AfterValidator(_language)]] | None] = None
    """ISO 639 codes for the card, "code" or "multilingual"; by default the languages of the corpus."""
    repo: Execution[Annotated[str, AfterValidator(repository_name)] | None] = None
    """Repository to push to: "owner/name", or "name" for the owner of the token; by default nothing is pushed."""
    private: Execution[bool] = True
    """Whether the repository is private if it has to be created."""
    branch: Execution[Annotated[str, Field(pattern=r"^\w[\w./-]*$")]] = "main"
    """Branch to push to; it is created from main if it does not exist."""
    pull_request: Execution[bool] = False
    """Whether to open a pull request to main instead of pushing to a branch."""
    tag: Execution[Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None] = None
    """A tag for the commit, such as "v1"; a new release needs a new one."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.pull_request and self.branch != "main":
            raise ValueError(f'branch: expected "main" with pull_request, got {self.branch!r}')
        if self.pull_request and self.tag is not None:
            raise ValueError(f"tag: expected none with pull_request, which is not released yet, got {self.tag!r}")
        return self

    @property
    def target(self) -> Target | None:
        """Where to push."""
        if self.repo is None:
            return None
        return Target(self.repo, branch=self.branch, endpoint=credentials.endpoint(), pull_request=self.pull_request)

    def completed(self, name: str, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        """With an added stage `NAME-parity` if it names none."""
        if self.parity is not None:
            return {name: self}
        parity = next(free for number in count(1) if (free := f"{name}-parity" + f"-{number}" * (number > 1)) not in stages)
        complete: Publish = self.model_copy(update={"parity": Ref.to(Parity, parity)})
        return {name: complete, parity: self._parity(stages)}

    def _parity(self, stages: Mapping[str, Stage]) -> CheckParity:
        """A comparison on the held-out data of the stages above: documents of corpora, rows of evaluations or trainings."""
        above = [other for other in stages if other in ancestors(inputs_of(stages), self.model) | {self.model}]
        trainings = [stage for stage in map(stages.__getitem__, above) if isinstance(stage, RowTraining)]
        scored = [stage for stage in map(stages.get, self.scores) if isinstance(stage, Evaluate)]
        tables: list[RowTable] = [task for stage in scored for task in stage.tasks if isinstance(task, RowTable)]
        tables = tables or [table for stage in trainings for table in stage.validation or stage.data]
        bases = [] if self.adapter is None else [ref for _, ref in edges(stages[self.adapter]) if ref.artifact is Checkpoint]
        rows = {(table.files.pattern, table.template): RowTable.model_construct(**_as_rows(table)) for table in tables}
        return CheckParity(
            model=self.model,
            gguf=self.gguf,
            base=bases[0] if bases else None,
            adapter=self.adapter if bases else None,
            corpora=[Ref.to(Corpus, other) for other in above if issubclass(stages[other].makes, Corpus)],
            prompts=list(rows.values()),
        )

    def run(self, context: Context) -> Metrics:
        """Write the release folder."""
        from runner.hub.model_card import Model, base_license, languages_of, model_card
        from runner.tracking.curves import draw

        release, checkpoint = Release(context.work), context.open(self.model)
        self._check_inputs(context)
        state = TrainingState(checkpoint.folder)
        for path in sorted({*checkpoint.content()} - {state.optimizer, state.training}):
            link_or_copy(path, context.work / path.relative_to(checkpoint.folder))
        for path in context.open(self.gguf).content() if self.gguf is not None else ():
            link_or_copy(path, context.work / path.name)
        for path in context.open(self.adapter).content() if self.adapter is not None else ():
            link_or_copy(path, release.adapter.folder / path.name)
        if self.parity is not None:
            link_or_copy(context.open(self.parity).results, release.parity)
        recipe = tomllib.loads(context.recipe)
        names = [*recipe["stage"], *context.records]  # as written, and those that were added
        records = {name: context.records[name] for name in names if name in context.records}
        scores = {str(ref): json.loads(context.open(ref).scores.read_text(encoding="utf-8")) for ref in self.scores}
        release.recipe.write_text(context.recipe, encoding="utf-8")
        _write_json(release.scores, scores)
        locked = {name: _locked(record, context.data.get(name, {})) for name, record in records.items()}
        _write_json(release.lock, {"recipe": recipe["name"], "stages": locked})
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
                license=self.license or base_license(recipe, records) or "other",
                languages=languages,
                version=records[self.model]["versions"].get("stockpot", ""),
                settings=context.settings,
                verdicts=_verdicts(recipe["stage"], records, [name for name in scores if recipe["stage"][name].get("gates")]),
            )
        )
        release.card.write_text(card, encoding="utf-8")
        files = _files(release)
        return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "languages": languages}

    def _check_inputs(self, context: Context) -> None:
        """InputError if the files to release with the model were made from another one."""
        from llm.errors import InputError

        model = context.records[self.model]["digest"]
        released = {str(ref): context.records[ref]["digest"] for ref in (self.gguf, self.adapter) if ref is not None}
        if self.gguf is not None and model not in context.input_digests(self.gguf):
            raise InputError(
                f"gguf: expected files of {str(self.model)!r}, got those of another model from {str(self.gguf)!r}"
            )
        if self.parity is not None:
            for name, digest in {str(self.model): model, **released}.items():
                if digest not in context.input_digests(self.parity):
                    raise InputError(f"parity: expected a comparison of {name!r}, got none in {str(self.parity)!r}")

    def effect(self, artifact: Path, *, digest: str, receipts: Path) -> Effect | None:
        """The push, unless a receipt says that it was done."""
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
        if credentials.token() is None:
            return Effect(f"the release is in {artifact}; {how_to_push(target)}", None)
        act = partial(self.push, artifact, digest, receipts)
        return Effect(f"tags what {target} holds" if pushes else f"pushes to {target}", act)

    def push(self, artifact: Path, digest: str, receipts: Path, acting: EffectContext) -> str:
        """Push the release, regardless of receipts; returns a sentence with its address."""
        from runner.hub.push import PushRequest, push
        from runner.hub.retries import Retries

        assert self.target is not None
        files = {path.relative_to(artifact).as_posix(): path for path in _files(Release(artifact))}
        order = PushRequest(artifact, files, digest, self.target, private=self.private, tag=self.tag)
        retries = Retries(sleep=acting.sleep, note=acting.note)
        return f"pushed: {push(order, receipts=receipts, overwrite=acting.overwrite, retries=retries).url}"


def _verdicts(
    tables: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]], judged: Sequence[str]
) -> dict[str, Sequence[Verdict]]:
    """The verdicts on the gates of each evaluation in `judged`."""
    from runner.stages import stage_kinds

    if not judged:
        return {}
    fields = {name: {key: value for key, value in table.items() if key != "kind"} for name, table in tables.items()}
    stages = {name: stage_kinds()[tables[name]["kind"]].model_validate(fields[name]) for name in tables}
    lineage = Lineage(inputs_of(stages), records)
    return {name: stages[name].verdicts(records[name]["metrics"], lineage) for name in judged}


def _files(release: Release) -> list[Path]:
    """The files to push: the content, the card, the lock file and the curves."""
    return [*release.content(), release.card, release.lock, *([release.curves] if release.curves.exists() else [])]


def _locked(record: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a stage in the lock file; `data` has its input files."""
    locked = {name: record[name] for name in LOCKED if name in record}
    return locked | ({"data": data} if data else {})


def _as_rows(table: RowTable) -> dict[str, Any]:
    """The fields of a RowTable, with rows skipped that cannot be used."""
    return {name: getattr(table, name) for name in RowTable.model_fields} | {"on_bad_row": "skip"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
