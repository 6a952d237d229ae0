"""The kind `corpus`: text from files and Hub datasets, cleaned, deduplicated, and split by the hash of each document.

`llm.text` does the work; here are the fields, and the rows of Hub datasets.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from llm.text.personal import PersonalKind
from llm.text.quality import RuleSet
from runner.artifacts import Corpus
from runner.files import write_whole
from runner.hub.languages import is_language
from runner.input_files import InputFile
from runner.stage import Context, Execution, Metrics, Semantic, Spec, Stage
from runner.stages.fields.data_tables import TextField
from runner.stages.fields.reading import PartOfRows, Reading, form_of

if TYPE_CHECKING:
    from llm.text.cleaning import Rules
    from llm.text.sources import Source


FORMATS = ("json", "csv", "parquet", "arrow", "text")  # of datasets on the Hub; others open archives, sound and models


def _language(code: str) -> str:
    if not is_language(code):
        raise ValueError(f'expected a code as in ISO 639-1, such as "en" or "zh", got {code!r}')
    return code


LanguageCode = Annotated[str, AfterValidator(_language)]


class SourceSpec(Spec):
    """One source of text: local files or a dataset on the Hub."""

    files: Semantic[InputFile | None] = None
    """A path, glob or folder: .jsonl, .json, .csv, .tsv, .txt, .md (each also .gz or .zst), .xlsx, .ods, .parquet, .docx or
    .pdf. A file of .txt, .md, .docx or .pdf is one document; a text of more than 5,000,000 characters is several."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    hub: Semantic[str | None] = None
    """A dataset on the Hub, "owner/name", read as a stream."""
    revision: Semantic[str] = "main"
    """Branch, tag or commit of the Hub dataset; resolved to a commit, which the record has."""
    split: Semantic[str | PartOfRows] = "train"
    """Split of the Hub dataset; or, of files, the part of the rows: { part = "train" }."""
    config: Semantic[str | None] = None
    """Configuration of the Hub dataset, if it has several."""
    text: Semantic[TextField] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""
    weight: Semantic[Annotated[float, Field(gt=0, le=1000)]] = 1.0
    """Passes over the source in training: 2.3 is two passes, and a third over 30% of the documents, chosen by hash; 0.3 keeps
    30% of the documents."""
    name: Semantic[str | None] = None
    """Name of the source in the corpus and in the record; by default the Hub dataset, else "source-N"."""
    language: Semantic[str | None] = None
    """Language of rows without a field `language`, such as "en" or "zh"."""
    where: Semantic[dict[str, str | int | bool]] = Field(default_factory=dict)
    """Use only rows whose fields have these values: { lang = "en" }."""
    limit: Semantic[Annotated[int, Field(gt=0)] | None] = None
    """Most rows to read."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceSpec":
        if (self.files is None) == (self.hub is None):
            raise ValueError("expected either files or hub" + ("" if self.files is None else ", got both"))
        if self.hub is not None and self.read is not None:
            raise ValueError("read: expected none beside hub, since it tells how to read files")
        if self.hub is not None and self.part is not None:
            raise ValueError(f"split: expected the name of a split of {self.hub}, got a part of files")
        if self.hub is None:  # compared with the defaults, since a resolved recipe writes those out
            of_hub = {"revision": "main", "config": None} | ({"split": "train"} if self.part is None else {})
            if given := [name for name, default in of_hub.items() if getattr(self, name) != default]:
                raise ValueError(f"{given[0]}: expected none beside files, since it belongs to a Hub dataset")
        return self

    @property
    def part(self) -> PartOfRows | None:
        """The part of the rows of its files."""
        return self.split if isinstance(self.split, PartOfRows) else None


class MakeCorpus(Stage, kind="corpus", version=2, makes=Corpus):
    """Reads, cleans, deduplicates and splits text."""

    sources: Semantic[Annotated[list[SourceSpec], Field(min_length=1)]]
    """The sources of text. Of several copies of a document, the first in this order is kept."""
    validation: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.01
    """Share of the documents that is held out, chosen by the hash of their text, so that adding documents moves no other."""
    min_characters: Semantic[Annotated[int, Field(ge=1)]] = 20
    """Minimum length of a document; shorter ones are dropped."""
    max_characters: Semantic[Annotated[int, Field(ge=1)]] = 5_000_000
    """Maximum length of a document; longer ones are dropped."""
    max_repeated_lines: Semantic[Annotated[float, Field(ge=0, le=1)]] = 0.4
    """Maximum share of a document's characters in lines that repeat an earlier line of it; other documents are dropped."""
    min_compressed: Semantic[Annotated[float, Field(ge=0, le=1)]] = 0.1
    """Minimum size of a document after zlib, as a share of its bytes; prose has 0.4 to 0.6. Other documents are dropped."""
    quality: Semantic[list[RuleSet]] = Field(default_factory=list)
    """Published rules that drop what is no prose, made for pages of the web: "gopher" (length, symbols, lists, repetition),
    "c4" (also drops lines that do not end a sentence) and "fineweb" (ends, repetition and length of lines). The record counts
    what each rule dropped."""
    languages: Semantic[list[LanguageCode]] = Field(default_factory=list)
    """Keep only documents in these languages, as identified from their text: ["en", "zh"]. By default any language."""
    redact: Semantic[list[PersonalKind]] = Field(default_factory=list)
    """Personal data that is replaced by its name in brackets, as far as a pattern finds it: "email", "telephone", "identity"
    (Chinese identity numbers), "social_security", "card", "account" (IBAN)."""
    near_duplicates: Semantic[bool] = True
    """Whether to drop near-duplicates of earlier documents; exact duplicates are always dropped."""
    similarity: Semantic[Annotated[float, Field(gt=0, le=1)]] = 0.8
    """Minimum Jaccard similarity of near-duplicates, over runs of five words (or Chinese characters)."""
    on_bad_row: Semantic[Literal["fail", "skip"]] = "fail"
    """What to do with a row that cannot be read or lacks the field: fail, or count it and go on."""
    shard_bytes: Execution[Annotated[int, Field(ge=1)]] = 4 * 2**20
    """Bytes of text per unit of work; more takes more memory per core."""

    @model_validator(mode="after")
    def _distinct_names(self) -> "MakeCorpus":
        names = self.names()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected a different name for each source, got {twice[0]!r} twice")
        return self

    def names(self) -> list[str]:
        """The name of each source. It does not depend on the file name: renaming a file does not change the corpus."""
        return [source.name or source.hub or f"source-{number}" for number, source in enumerate(self.sources, start=1)]

    def rules(self) -> "Rules":
        """The rules for documents that are kept."""
        from llm.text.cleaning import Rules

        return Rules(
            min_characters=self.min_characters,
            max_characters=self.max_characters,
            max_repeated_lines=self.max_repeated_lines,
            min_compressed=self.min_compressed,
            quality=tuple(self.quality),
            languages=tuple(self.languages),
            redact=tuple(self.redact),
        )

    def local_sources(self) -> "list[Source]":
        """The sources that read files."""
        return [_source(spec, name, {}) for spec, name in zip(self.sources, self.names(), strict=True) if spec.hub is None]

    def run(self, context: Context) -> Metrics:
        """Build the corpus with all cores."""
        from llm.errors import InputError
        from llm.text.corpus import build_corpus
        from llm.text.executor import LocalProcesses
        from llm.text.language import known_languages
        from llm.text.readers import encoding_notes
        from llm.text.shards import CorpusConfig

        if self.languages and (unknown := sorted(set(self.languages) - known_languages())):
            raise InputError(
                'languages: expected codes as in ISO 639-1 that the identifier knows, such as "en" or "zh", '
                f"got {unknown[0]!r}"
            )
        corpus = Corpus(context.work)
        commits = _pin(self.sources, context.scratch / "commits.json")
        sources = [_source(spec, name, commits) for spec, name in zip(self.sources, self.names(), strict=True)]
        for note in (note for source in sources for note in encoding_notes(source.files, source.form)):
            context.report(note=note)
        metrics = build_corpus(
            sources,
            CorpusConfig(
                rules=self.rules(),
                validation=self.validation,
                similarity=self.similarity if self.near_duplicates else None,
                skip_bad_rows=self.on_bad_row == "skip",
            ),
            train=corpus.train,
            validation=corpus.validation,
            scratch=context.scratch,
            executor=LocalProcesses(context.cores),
            shard_bytes=self.shard_bytes,
            report=context.report,
            should_stop=context.should_stop,
        )
        for spec, name in zip(self.sources, self.names(), strict=True):
            of_source = metrics["sources"][name]
            of_source["weight"] = spec.weight
            if spec.hub is not None:
                of_source |= {"hub": spec.hub, "revision": spec.revision, "commit": commits[_branch(spec)]}
        return metrics


def _source(spec: SourceSpec, name: str, commits: Mapping[str, str]) -> "Source":
    from llm.text.sources import Source

    rows: Callable[[], Iterable[Mapping[str, Any]]] | None = None
    place = ""
    if spec.hub is not None:
        rows = partial(hub_rows, spec.hub, commits[_branch(spec)], config=spec.config, split=str(spec.split))
        place = f"{spec.hub}@{commits[_branch(spec)][:8]}/{spec.split}"
    return Source(
        name=name,
        files=tuple(spec.files.fetched()) if spec.files is not None else (),
        rows=rows,
        place=place,
        text=spec.text,
        weight=spec.weight,
        language=spec.language,
        where=spec.where,
        limit=spec.limit,
        form=form_of(spec.read, spec.part),
    )


def _branch(spec: SourceSpec) -> str:
    return f"{spec.hub}@{spec.revision}"


def _pin(specs: Iterable[SourceSpec], path: Path) -> dict[str, str]:
    """The commit of each Hub source, kept in `path`, so that a restart reads the same rows."""
    commits: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for spec in specs:
        if spec.hub is not None and _branch(spec) not in commits:
            commits[_branch(spec)] = hub_commit(spec.hub, spec.revision)
    write_whole(path, json.dumps(commits), durable=False)
    return commits


def hub_commit(hub: str, revision: str) -> str:
    """The current commit of a branch, tag or commit of a Hub dataset."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from llm.errors import InputError

    try:
        commit = HfApi().dataset_info(hub, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{hub}: the Hub has no such dataset at revision {revision!r}, or cannot be reached: {error}"
        ) from error
    if commit is None:
        raise InputError(f"{hub}: expected a commit from the Hub for the revision {revision!r}, got none")
    return commit


def hub_rows(hub: str, commit: str, *, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a Hub dataset at a commit, as a stream."""
    import datasets
    import pyarrow as pa

    from llm.errors import InputError

    try:
        builder = datasets.load_dataset_builder(hub, name=config, revision=commit)
        form = type(builder).__module__.rpartition(".")[2]
        if form not in FORMATS:
            raise InputError(f"{hub}@{commit[:8]}: expected files of {', '.join(FORMATS)}, got {form}")
        for file in (file for files in (builder.config.data_files or {}).values() for file in files):
            # A local folder may have the same name, and the page of a dataset may name any file, also one of this machine.
            if not file.rpartition("::")[2].startswith(f"hf://datasets/{hub}@"):
                raise InputError(f"{hub}@{commit[:8]}: expected files of this dataset on the Hub, got {file}")
        yield from builder.as_streaming_dataset(split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        raise InputError(f"{hub}@{commit[:8]}: split {split!r} cannot be read: {error}") from error
