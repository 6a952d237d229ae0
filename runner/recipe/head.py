"""The tables of a recipe that are not stages."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from llm.training.alerts.config import Alerts
from runner.cache.remote import address_fault
from runner.recipe.sweep import SweepTable
from runner.stage import Execution, Parallel, Semantic, Spec
from runner.tracking.trackers import TrackerName

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


class AlertsTable(Alerts):
    """What is watched in every training, unless its stage says otherwise, and who is told of it."""

    notify: list[str] = Field(default_factory=list)
    """Where notices of alerts and faults go, as addresses of apprise ("ntfy://TOPIC"). One with a password in it belongs in
    STOCKPOT_NOTIFY instead."""

    @field_validator("notify", mode="before")
    @classmethod
    def _are_addresses(cls, notify: Any) -> Any:
        if not isinstance(notify, list) or not all(isinstance(one, str) and ADDRESS.fullmatch(one) for one in notify):
            # What was found is not said: it may hold a secret.
            raise ValueError('expected a list of addresses as apprise knows them, such as ["ntfy://TOPIC"]')
        return notify


class CacheTable(Spec):
    """A cache elsewhere that is asked for what is not here; `--remote` and STOCKPOT_REMOTE override it."""

    remote: Execution[str | None] = None
    """s3://BUCKET/..., hf://OWNER/REPOSITORY/..., a folder, or memory://..."""
    upload: Execution[bool] = True
    """Whether what a run makes is uploaded there."""

    @field_validator("remote")
    @classmethod
    def _is_address(cls, remote: str | None) -> str | None:
        if remote is not None and (fault := address_fault(remote)):
            raise ValueError(fault)
        return remote


class TrackingTable(Spec):
    """Where the curves of trainings go besides metrics.jsonl."""

    to: Execution[list[TrackerName] | Literal["auto"]] = "auto"
    """Trackers, each with its client installed; "auto" is aim where it is installed, [] is none."""


class Head(Spec):
    """What stands in a recipe above its stages."""

    name: Execution[Annotated[str, Field(pattern=r"^[\w.-]+$")]]
    """What the recipe is called."""
    description: Execution[str] = ""
    """One sentence on what comes out."""
    seed: Semantic[int] = 0
    """Default seed of every stage that draws randomness."""
    parallel: Execution[Parallel] = Parallel()
    """Where and how to run."""
    cache: Execution[CacheTable] = CacheTable()
    """Where else results may be."""
    tracking: Execution[TrackingTable] = TrackingTable()
    """Where curves go."""
    alerts: Execution[AlertsTable] = AlertsTable()
    """What is watched in every training, and who is told of it; `stage.NAME.alerts` overrides it field by field."""
    sweep: Execution[SweepTable | None] = None
    """Settings to compare, the best of which is taken."""
