"""A plan whose finished artifacts were fetched from a remote cache, as far as somebody needs them now."""

from collections.abc import Callable, Iterable

from runner.cache.remote import Mirror
from runner.cache.store import Store, Waiting
from runner.planning.plan import RUNNABLE, Entry, Plan
from runner.recipe.recipe import Recipe


def fetched_plan(
    recipe: Recipe,
    store: Store,
    remote: str | None,
    *,
    needed: Callable[[Plan], Iterable[Entry]],
    note: Callable[[str], None],
) -> Plan:
    """The plan after the records of stages that would run, and then the artifacts of `needed`, were taken from a remote,
    if one is named and has them. A remote that fails is told by `note`, and does without.
    """
    mirror = Mirror(remote, note=note, tick=lambda: None, upload=False)
    while True:
        plan = Plan(recipe, store)
        unknown = [entry for entry in plan if entry.state in RUNNABLE and entry.record is None] if remote else []
        found = [mirror.look_up(store, entry.stage.kind, str(entry.key)) for entry in unknown]  # all of them are asked for
        if any(found):
            continue
        missing = [entry for entry in needed(plan) if entry.path is None and entry.record and mirror.has(entry.record)]
        fetched = [_is_fetched(mirror, store, entry, note) for entry in missing]
        if not any(fetched):
            return plan


def _is_fetched(mirror: Mirror, store: Store, entry: Entry, note: Callable[[str], None]) -> bool:
    assert entry.record is not None  # of what is fetched
    with store.lock(entry.stage, entry.record.key, waiting=Waiting()):
        if not store.has_artifact(entry.record) and not mirror.fetch(store, entry.record):
            return False
    note(f"{entry.name}: fetched from the remote")
    return True
