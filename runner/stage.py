"""What the author of a new kind of stage needs: Stage, Ref, Context, Parallel.

A kind is a subclass of `Stage` in a file of its own under `runner/stages/`:

    class Count(Stage, kind="count", version=1, makes=Scores):
        \"\"\"Counts the documents of a corpus.\"\"\"

        corpus: Semantic[Ref[Corpus]]
        \"\"\"The text to count.\"\"\"
        sample: Semantic[int] = 1000
        \"\"\"Documents to read.\"\"\"

        def run(self, context: Context) -> Metrics:
            corpus = context.open(self.corpus)
            ...  # write files into context.work, named as the artifact class names them
            return {"documents": 1000}

Every field says whether it decides the result (`Semantic`, part of the cache key) or only how the result is computed
(`Execution`, never part of it). The module is imported while planning, so torch and other slow modules are imported inside
`run`; where workers can be forked, the modules named by `imports` are imported once for all stages. After a crash, `run` is
called again in the same `context.work`, and continues from what it finds there.
"""

import abc
import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from runner.artifacts import Artifact

T = TypeVar("T")
A = TypeVar("A", bound=Artifact)

Metrics = Mapping[str, Any]  # JSON values; they go to record.json, never into a digest


class Identity(enum.Enum):
    """Whether a field is part of a stage's key."""

    SEMANTIC = "semantic"  # decides the result
    EXECUTION = "execution"  # decides how, where or how fast it is computed


Semantic = Annotated[T, Identity.SEMANTIC]
Execution = Annotated[T, Identity.EXECUTION]


class Ref(str, Generic[A]):
    """The name of another stage, typed by the artifact that is needed from it: `Ref[Corpus]`."""

    artifact: type[A]

    @classmethod
    def to(cls, artifact: type[A], name: str) -> "Ref[A]":
        """The reference to the stage `name`, which makes an `artifact`."""
        ref: Ref[A] = cls(name)
        ref.artifact = artifact
        return ref

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (artifact,) = get_args(source)

        def with_type(name: str) -> "Ref[A]":
            return cls.to(artifact, str(name))

        return core_schema.no_info_after_validator_function(
            with_type, core_schema.str_schema(strict=True), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "stage"}


NAME = r"^\w[\w.-]{0,99}$"  # of a recipe or a stage: it becomes part of names of files, runs and branches


class Spec(BaseModel):
    """A table of a recipe: strict types, no unknown keys, frozen; each field marked Semantic or Execution."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class Parallel(Spec):
    """Where and how to run; never part of any stage's identity."""

    processes: Execution[Annotated[int, Field(ge=1)] | Literal["auto"]] = "auto"
    """Processes of a training on each node, and of an evaluation; "auto" is one per GPU, or one without GPUs."""
    nodes: Execution[Annotated[int, Field(ge=1)]] = 1
    """Nodes of a training. More than one needs an engine with several machines, which is chosen by whoever runs the recipe:
    `--engine`."""
    strategy: Execution[Literal["ddp", "fsdp"]] = "ddp"
    """How processes share a training: with "ddp" each has the whole model, and gradients are summed; with "fsdp" (FSDP2)
    weights, gradients and optimizer state are sharded, and each layer gathers its weights to compute. One process alone does
    neither."""
    find_unused_parameters: Execution[bool] = False
    """For "ddp": find weights without a gradient in each step. Costs time; needed only if the model has such weights."""
    precision: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """Precision of matrix products in training, evaluation, `run chat` and `run serve`; "auto" is bf16 where the hardware is
    fast at it, else fp32. The record of an evaluation says which it was."""
    compile: Execution[bool | Literal["auto"]] = "auto"
    """Whether layers are compiled by torch.compile; "auto" compiles if the training is long enough to save time."""
    fused_attention: Execution[bool | Literal["auto"]] = "auto"
    """Whether attention uses Stockpot's own CPU kernel, built by the machine's C++ compiler; "auto" uses it on CPUs with
    AVX512-BF16 if a training in bf16 is long enough to save time. Rows of more than 1,024 positions do without it, because its
    memory grows with the square of a row."""
    retries: Execution[int] = Field(2, ge=0)
    """How often a training restarts from its last checkpoint after a worker died, a process group failed, memory ran out or a
    step did not end. The count starts again after a fault at a later step than before. Faults of data or recipe are not
    retried."""
    fallback: Execution[Literal["single", "none"]] = "single"
    """What to do when retries are used up: "single" continues with one process and the same global batch; "none" fails."""
    rejoin_minutes: Execution[float] = Field(2.0, gt=0, le=10_000)
    """How long the retry of a training on several nodes waits for its nodes to start; then `fallback` decides."""
    timeout_minutes: Execution[float] = Field(30.0, gt=0, le=10_000)
    """How long the processes of a training wait for each other, while forming a group and in each collective operation."""
    stall_minutes: Execution[float] = Field(30.0, gt=0, le=10_000)
    """A step that takes longer than this, and longer than 20 times the longest step so far, counts as a fault. The first step
    may take four times as long, and at least ten minutes."""

    @field_validator("find_unused_parameters")
    @classmethod
    def _needs_ddp(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("strategy") == "fsdp":
            raise ValueError('expected false with strategy = "fsdp", got true; strategy = "ddp" can find them')
        return value


@dataclass(frozen=True)
class Context:
    """What a running stage knows of the run."""

    name: str  # of the stage in its recipe, for messages
    work: Path  # the artifact's files are written here, under their final names
    scratch: Path  # inside work, for what a restart may reuse; deleted when the stage is finished
    inputs: Mapping[str, Path]  # stage name -> folder of its finished artifact
    records: Mapping[str, Mapping[str, Any]]  # stage name -> its record; of every ancestor
    recipe: str  # the resolved recipe, as TOML
    parallel: Parallel
    cores: int  # processor cores this stage may use
    report: Callable[..., None]  # report(step=3, loss=1.2): one line of metrics.jsonl, which progress and trackers read
    should_stop: Callable[[], bool]  # true once the run has to stop: checkpoint, then raise llm.errors.Interrupted
    row_log: Path | None = None  # a file of this process, for the rows that a training learns from
    beginning: Path | None = None  # a finished artifact of the same kind to continue from
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # input files, by stage and field
    settings: Sequence[Sequence[str]] = ()  # of the sweep that this is the best setting of: a header, then a row for each

    def open(self, ref: Ref[A]) -> A:
        """The finished artifact of the stage `ref`."""
        return ref.artifact(self.inputs[ref])

    def input_digests(self, name: str) -> set[str]:
        """The digests of the artifacts that the stage `name`, whose record is known, was made from."""
        return {source["digest"] for source in self.records[name].get("inputs", {}).values()}


class Verdict(Protocol):
    """The result of one gate; as text, a sentence with the value, the bound and the outcome."""

    @property
    def passed(self) -> bool | None:
        """Whether the score satisfies the gate; None while a score that it is compared with is missing."""

    @property
    def gate(self) -> str:
        """The condition: `section.macro_f1 at least 0.9`."""

    @property
    def found(self) -> str:
        """The value with its interval."""


@dataclass(frozen=True)
class Lineage:
    """What planning knows of the stages of a recipe."""

    inputs: Mapping[str, Sequence[str]]  # by stage, the stages that it reads
    records: Mapping[str, Mapping[str, Any]]  # by stage, the record of each that is finished


@dataclass(frozen=True)
class EffectContext:
    """What an effect may do, and how it reaches the user."""

    overwrite: bool = False  # whether to overwrite changes by others
    note: Callable[[str], None] = lambda sentence: None  # shows the user a sentence
    sleep: Callable[[float], None] = time.sleep  # seconds; raises KeyboardInterrupt once the user asks to stop


@dataclass(frozen=True)
class Effect:
    """What remains to be done outside the cache once an artifact exists, such as a push."""

    sentence: str  # what `act` will do; without it, why nothing is done now and what the user can do
    act: Callable[[EffectContext], str] | None  # returns a sentence on what was done; None: nothing to do now


class Stage(Spec):
    """One node of the graph: parameters as fields, work as `run`."""

    kind: ClassVar[str]
    version: ClassVar[int]  # raised when the same fields give another result
    makes: ClassVar[type[Artifact]]
    imports: ClassVar[tuple[str, ...]] = ()  # modules that it needs and that take seconds to import
    trains: ClassVar[bool] = False  # whether it is a training: in the processes of [parallel], on all nodes, with retries
    in_processes: ClassVar[bool] = (
        False  # of another stage, whether it runs in the processes that [parallel] says for a machine
    )
    holds_recipe: ClassVar[bool] = False  # whether its artifact holds the recipe, which then is part of its key
    user_fields: ClassVar[tuple[str, ...]] = ()  # fields that whoever runs the recipe decides, so that no artifact holds them

    registry: ClassVar[dict[str, type["Stage"]]] = {}

    def __init_subclass__(
        cls, *, kind: str | None = None, version: int = 1, makes: type[Artifact] | None = None, **options: Any
    ) -> None:
        """Register the class under its kind; a class without a kind only holds what several kinds share."""
        super().__init_subclass__(**options)
        if kind is not None and makes is not None:
            cls.kind, cls.version, cls.makes = kind, version, makes
            Stage.registry[kind] = cls

    def parallel_fault(self, parallel: Parallel) -> str | None:
        """Why the stage cannot run as [parallel] says, beginning with the field; None if it can."""
        return None

    def completed(self, name: str, stages: Mapping[str, "Stage"]) -> Mapping[str, "Stage"]:
        """The stage, perhaps changed, as `name`, and the stages that it adds to `stages` because the recipe left them out."""
        return {name: self}

    def expanded(self, name: str, stages: Mapping[str, "Stage"]) -> Mapping[str, "Stage"]:
        """The ordinary stages that the stage `name` is split into, itself last, so that other recipes can reuse their results
        (`runner.recipe.branches`).
        """
        return {name: self}

    def reusable_work(self, mine: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """How much of the work for the identity `mine` is done in a result with the identity `other`; 0 if it cannot be
        continued. The result must not depend on whether it was continued.
        """
        return 0

    @property
    def attempted_changes(self) -> Sequence[Mapping[str, Any]]:
        """The fields that each attempt changes; it runs after the attempt before failed a gate (`runner.recipe.branches`)."""
        return ()

    @property
    def has_gates(self) -> bool:
        """Whether it has gates."""
        return False

    @property
    def score_names(self) -> Sequence[str]:
        """The scores in its record, as `task.metric`; one that ends in a dot is a prefix of names that are not known yet."""
        return ()

    def faults_among(self, stages: Mapping[str, "Stage"]) -> Iterator[str]:
        """What does not fit the other stages of the recipe, each fault with its place: `gates[0].above: expected ...`."""
        yield from ()

    def faults_given(self, stages: Mapping[str, "Stage"], made: Mapping[str, Path]) -> Iterator[str]:
        """What is wrong with the artifacts `made` by stages above, told before other stages run."""
        yield from ()

    def lacks(self) -> Iterator[str]:
        """What this machine lacks to run the stage, each with its place and the cure; asked only if it is about to run."""
        yield from ()

    def prepare(self, context: Context) -> None:
        """Work for one process before a process group is formed, such as tokenizing; writes into context.scratch."""

    @abc.abstractmethod
    def run(self, context: Context) -> Metrics:
        """Do the work, in every process of a training; returns the metrics for the record."""

    def extra_identity(self) -> Mapping[str, Any]:
        """Execution fields that decide the result with some of their values: by field, what of it enters the key."""
        return {}

    def verdicts(self, metrics: Metrics, lineage: Lineage) -> Sequence[Verdict]:
        """The results of the gates on what `run` returned, on every run and while planning. Stages that read the artifact wait
        until all gates pass.
        """
        return ()

    def effect(self, artifact: Path, *, digest: str, receipts: Path) -> Effect | None:
        """What remains to be done once the artifact exists, if anything; `receipts` is a folder for notes of what was done."""
        return None
