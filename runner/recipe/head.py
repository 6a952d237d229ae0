"""The head of a recipe: its fields and tables that are not stages."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from llm.training.alerts.config import Alerts
from runner.cache.remote import address_fault
from runner.recipe.sweep import SweepTable
from runner.stage import NAME, Execution, Parallel, Semantic, Spec
from runner.tracking.trackers import TrackerName

# Services at an address of their own: a recipe chooses a topic or a channel there, never a host, a method or a header.
ADDRESS = re.compile(r"ntfy://[\w-]{1,64}|(discord|slack|tgram|pover|pbul)://[\w:@/-]{1,300}", re.ASCII)


class AlertsTable(Alerts):
    """The alerts of every training, unless its stage overrides them, and where notices go."""

    notify: list[str] = Field(default_factory=list)
    """Where notices of alerts and faults go: ntfy://TOPIC, or an address of discord, slack, tgram, pover or pbul as apprise
    has it. Any other, and one with a password, belongs in STOCKPOT_NOTIFY."""

    @field_validator("notify", mode="before")
    @classmethod
    def _are_addresses(cls, notify: Any) -> Any:
        if not isinstance(notify, list) or not all(isinstance(one, str) and ADDRESS.fullmatch(one) for one in notify):
            raise ValueError(
                'expected a list of apprise addresses, such as ["ntfy://TOPIC"] (not shown: it may hold a password); '
                "one that names a host, or has parameters, belongs in STOCKPOT_NOTIFY"
            )
        return notify


class CacheTable(Spec):
    """A remote cache to look up results that are not in the local one; `--remote` and STOCKPOT_REMOTE override it."""

    remote: Execution[str | None] = None
    """s3://BUCKET/..., hf://OWNER/REPOSITORY/..., a folder, or memory://..."""
    upload: Execution[bool] = True
    """Whether the results of a run are uploaded to it."""

    @field_validator("remote")
    @classmethod
    def _is_address(cls, remote: str | None) -> str | None:
        if remote is not None and (fault := address_fault(remote)):
            raise ValueError(fault)
        return remote


class TrackingTable(Spec):
    """Where the curves of trainings go in addition to metrics.jsonl."""

    to: Execution[list[TrackerName] | Literal["auto"]] = "auto"
    """Trackers, whose clients must be installed; "auto" is aim if it is installed, [] is none."""


class Head(Spec):
    """The fields of a recipe outside of its stages."""

    name: Execution[Annotated[str, Field(pattern=NAME)]]
    """The name of the recipe."""
    description: Execution[str] = ""
    """One sentence on the result."""
    seed: Semantic[int] = 0
    """Default seed of every stage that uses randomness."""
    parallel: Execution[Parallel] = Parallel()
    """Where and how to run."""
    cache: Execution[CacheTable] = CacheTable()
    """A remote cache of results."""
    tracking: Execution[TrackingTable] = TrackingTable()
    """Trackers of training curves."""
    alerts: Execution[AlertsTable] = AlertsTable()
    """The alerts of every training, and where notices go; `stage.NAME.alerts` overrides them field by field."""
    sweep: Execution[SweepTable | None] = None
    """Settings to compare; the stages behind use the best."""
