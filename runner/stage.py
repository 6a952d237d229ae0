"""The one page that the author of a new kind of stage reads: Stage, Ref, InputFile, Context, Parallel.

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
(`Execution`, never part of it). The module is imported while planning, so torch and whatever is slow to import is imported
inside `run`; where workers can be forked, what `imports` names of it is imported once for all stages. `run` may be called
again in the same `context.work` after a crash, and goes on from what it finds there.
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

    wants: type[A]

    @classmethod
    def to(cls, wants: type[A], name: str) -> "Ref[A]":
        """The reference to the stage `name`, which makes what it `wants`."""
        ref: Ref[A] = cls(name)
        ref.wants = wants
        return ref

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (wants,) = get_args(source)

        def with_type(name: str) -> "Ref[A]":
            return cls.to(wants, str(name))

        return core_schema.no_info_after_validator_function(
            with_type, core_schema.str_schema(strict=True), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "stage"}


class Spec(BaseModel):
    """A table of a recipe: strict types, no unknown keys, frozen; each field marked Semantic or Execution."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class Parallel(Spec):
    """Where and how to run; never part of any stage's identity."""

    processes: Execution[Annotated[int, Field(ge=1)] | Literal["auto"]] = "auto"
    """Processes of a training on each machine; "auto" is one per GPU here, else one."""
    machines: Execution[Annotated[int, Field(ge=1)] | Literal["auto"]] = "auto"
    """Machines that train together, each with a run of its own; "auto" is as Slurm or torchrun say, else one."""
    machine_rank: Execution[Annotated[int, Field(ge=0)] | Literal["auto"]] = "auto"
    """Which of the machines this is; that of rank 0 makes what is not trained, and writes."""
    main_address: Execution[str | None] = None
    """HOST or HOST:PORT of the machine of rank 0; PORT (29500 by default) and the next one are used there."""
    strategy: Execution[Literal["ddp", "fsdp"]] = "ddp"
    """How processes share a training: "ddp" has the whole model in each and sums gradients; "fsdp" (FSDP2) spreads weights,
    gradients and optimizer state over them, and a layer gathers its weights to compute. One process alone does neither."""
    find_unused_parameters: Execution[bool] = False
    """Of "ddp": look in each step for weights that are not used; it costs time, and is needed only where there are some."""
    precision: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of matrix products while training; "auto" is bf16 where the hardware is fast at it, else fp32."""
    compile: Execution[bool | Literal["auto"]] = "auto"
    """Whether layers run as torch.compile makes them; "auto" is where a training is long enough to gain by it."""
    fused_attention: Execution[bool | Literal["auto"]] = "auto"
    """Whether attention has a kernel of its own, which the machine's C++ compiler makes; "auto" is where a training in bf16 is
    long enough, on CPUs with AVX512-BF16."""
    retries: Execution[int] = Field(2, ge=0)
    """How often a training begins again from its last checkpoint after a worker died, a group failed, memory ran out or a step
    did not end; a fault at a later step than any before begins the count anew. Faults of data or recipe are not retried."""
    fallback: Execution[Literal["single", "none"]] = "single"
    """What follows when retries are used up: "single" goes on with one process and the same global batch."""
    rejoin_minutes: Execution[float] = Field(2.0, gt=0, le=10_000)
    """How long each retry waits for a machine that is gone, and the others for that of rank 0, to be there again."""
    timeout_minutes: Execution[float] = Field(30.0, gt=0, le=10_000)
    """How long the processes of a training wait for each other, when they form a group and when they compute together."""
    stall_minutes: Execution[float] = Field(30.0, gt=0, le=10_000)
    """A step that has not ended after this long, and after 20 times the longest step, counts as a fault; until the first step
    has ended it is four times as long, and ten minutes at least."""

    @field_validator("find_unused_parameters")
    @classmethod
    def _of_ddp(cls, wanted: bool, info: ValidationInfo) -> bool:
        if wanted and info.data.get("strategy") == "fsdp":
            raise ValueError('expected strategy = "ddp" beside true, got "fsdp"')
        return wanted


@dataclass(frozen=True)
class Context:
    """What a running stage may know of its surroundings."""

    name: str  # of the stage in its recipe, for messages
    work: Path  # the artifact's files are written here, under their final names
    scratch: Path  # inside work; what a restart may reuse; gone when the stage is finished
    inputs: Mapping[str, Path]  # stage name -> folder of its finished artifact
    records: Mapping[str, Mapping[str, Any]]  # stage name -> record of it; every ancestor
    recipe: str  # the resolved recipe, as TOML
    parallel: Parallel
    cores: int  # processor cores this stage may use
    report: Callable[..., None]  # report(step=3, loss=1.2): one line of metrics.jsonl, followed by progress and trackers
    should_stop: Callable[[], bool]  # true once the run was asked to end: checkpoint, then raise llm.errors.Interrupted
    row_log: Path | None = None  # a file of this process, for the rows that a training learns from
    beginning: Path | None = None  # a finished artifact of the same kind, which has some of the work behind it
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # input files, by stage and field
    settings: Sequence[Sequence[str]] = ()  # of a sweep whose best setting this is made from: a head and a row of each

    def open(self, ref: Ref[A]) -> A:
        """The finished artifact that the stage `ref` made."""
        return ref.wants(self.inputs[ref])


class Verdict(Protocol):
    """The judgement of one gate; as text it is a sentence with the value, the wanted value and the outcome."""

    @property
    def passed(self) -> bool | None:
        """Whether the score is what the recipe asks; None while a score that it is compared with is missing."""

    @property
    def gate(self) -> str:
        """What was asked: `section.macro_f1 at least 0.9`."""

    @property
    def found(self) -> str:
        """What was found: the value with its interval."""


@dataclass(frozen=True)
class Lineage:
    """What planning knows of the stages of a recipe."""

    inputs: Mapping[str, Sequence[str]]  # by stage, the stages that it reads
    records: Mapping[str, Mapping[str, Any]]  # by stage, the record of each that is finished


@dataclass(frozen=True)
class Acting:
    """How a run lets an effect act."""

    overwrite: bool = False  # also over what somebody else changed meanwhile
    note: Callable[[str], None] = lambda sentence: None  # tells the user of what takes time
    sleep: Callable[[float], None] = time.sleep  # seconds; raises KeyboardInterrupt once the user asks to stop


@dataclass(frozen=True)
class Effect:
    """What is left to do in the world once an artifact exists: a push, say."""

    sentence: str  # what acting will do; or, where nothing is to be done now, why, and how the user gets it done
    act: Callable[[Acting], str] | None  # does it and returns a sentence on what was done; None: nothing to do now


class Stage(Spec):
    """One node of the graph: parameters as fields, work as `run`."""

    kind: ClassVar[str]
    version: ClassVar[int]  # raised when the same fields come to mean another result
    makes: ClassVar[type[Artifact]]
    imports: ClassVar[tuple[str, ...]] = ()  # modules that it needs and that take seconds to import
    trains: ClassVar[bool] = False  # run under `accelerate launch`, in as many processes as [parallel] says

    registry: ClassVar[dict[str, type["Stage"]]] = {}

    def __init_subclass__(
        cls, *, kind: str | None = None, version: int = 1, makes: type[Artifact] | None = None, **options: Any
    ) -> None:
        """Register the class under its kind; a class without one only holds what several kinds share."""
        super().__init_subclass__(**options)
        if kind is not None and makes is not None:
            cls.kind, cls.version, cls.makes = kind, version, makes
            Stage.registry[kind] = cls

    def parallel_fault(self, parallel: Parallel) -> str | None:
        """Why it cannot run as [parallel] says (the field at odds, what was found, what is wanted); None if it can."""
        return None

    def completed(self, name: str, stages: Mapping[str, "Stage"]) -> Mapping[str, "Stage"]:
        """The stage `name` with what the recipe left out: itself, perhaps changed, and stages that it adds to `stages`."""
        return {name: self}

    def parted(self, name: str, stages: Mapping[str, "Stage"]) -> Mapping[str, "Stage"]:
        """The ordinary stages that the stage `name` among `stages` stands for, itself last: what they share with those of
        other recipes is found in the cache (`runner.recipe.branches`).
        """
        return {name: self}

    def behind(self, mine: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """How much of the work for the identity `mine` a result with the identity `other` has behind it, if it can be gone on
        from; else 0. The result must not depend on whether it was.
        """
        return 0

    @property
    def tries(self) -> Sequence[Mapping[str, Any]]:
        """What to change where a gate behind this stage fails, one attempt after the other (`runner.recipe.branches`)."""
        return ()

    @property
    def judged(self) -> bool:
        """Whether it has gates."""
        return False

    @property
    def scored(self) -> Sequence[str]:
        """The scores in its record, as `task.metric`; one that ends in a point begins names that are known only then."""
        return ()

    def faults_beside(self, stages: Mapping[str, "Stage"]) -> Iterator[str]:
        """What is wrong with it among the stages of its recipe, each fault with its place: `gates[0].above: wants ...`."""
        yield from ()

    def prepare(self, context: Context) -> None:
        """Work for one process before a training group is formed (tokenizing, say); writes into context.scratch."""

    @abc.abstractmethod
    def run(self, context: Context) -> Metrics:
        """Do the work; return what the record should tell. Called in every process of a training."""

    def decided(self) -> Mapping[str, Any]:
        """What else than the semantic fields decides the result, by field, as it enters the key: of a field that does so only
        with some of its values.
        """
        return {}

    def verdicts(self, metrics: Metrics, lineage: Lineage) -> Sequence[Verdict]:
        """Judges what `run` returned, on every run and while planning; what reads the artifact waits until all gates pass."""
        return ()

    def effect(self, artifact: Path, *, digest: str, receipts: Path) -> Effect | None:
        """What is left to do once the artifact exists, None if nothing; `receipts` is a folder for notes of what was done."""
        return None
