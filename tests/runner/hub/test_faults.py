"""Pushes to a Hub that is busy, broken or unreachable for a while: none is left incomplete, and nothing is sent twice."""

import random
from http import HTTPStatus
from pathlib import Path

import pytest
from hub_server import OWNER, SIGNATURE, TOKEN, Fault, Hub
from releases import MADE_BY_THE_HUB, REPO, Releases, digest_of, held_by, summaries

from runner.errors import StageError
from runner.hub.receipts import Journal
from runner.hub.retries import Retries
from runner.stage import EffectContext
from runner.stages.publish import Publish

# huggingface_hub 2.4 hands files to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FAULTS = [
    Fault(HTTPStatus.TOO_MANY_REQUESTS),
    Fault(HTTPStatus.TOO_MANY_REQUESTS, retry_after=3),
    Fault(HTTPStatus.INTERNAL_SERVER_ERROR),
    Fault(HTTPStatus.SERVICE_UNAVAILABLE),
    Fault(ends="body"),
    Fault(ends="work"),
    Fault(ends="answer"),
    Fault(ends="middle"),
]
COMMIT = "/commit/main"
REQUESTS = 9  # of a push without a tag, at least


@pytest.fixture
def releases(tmp_path: Path, hub: Hub) -> Releases:
    return Releases(tmp_path, hub)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_commit_interrupted_by_a_fault_is_made_once(hub: Hub, releases: Releases, fault: Fault) -> None:
    hub.fault_in[COMMIT] = [fault]
    receipt = releases.push("one", tag="v1")
    assert summaries(hub) == ["initial commit", f"Release {digest_of('one')[:12]}"]
    assert held_by(hub, "v1") == releases.content("one")
    assert receipt.commit == hub.repositories[REPO].branches["main"]


@pytest.mark.parametrize("ends", ["work", "answer"])
def test_a_pull_request_interrupted_by_a_fault_is_opened_once(hub: Hub, releases: Releases, ends: str) -> None:
    releases.push("one")
    hub.fault_in[COMMIT] = [Fault(ends=ends)]
    assert releases.push("two", pull_request=True).url.endswith("/discussions/1")
    assert [name for name in hub.repositories[REPO].branches if name.startswith("refs/")] == ["refs/pr/1"]


def test_weights_that_arrived_are_not_sent_again(hub: Hub, releases: Releases) -> None:
    hub.fault_in[COMMIT] = [Fault(HTTPStatus.SERVICE_UNAVAILABLE)] * 99
    for _ in range(2):
        with pytest.raises(StageError, match="503"):
            releases.push("one")
    hub.fault_in.clear()
    releases.push("one")
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert held_by(hub) == releases.content("one")


def test_waits_grow_unless_the_hub_asks_for_its_own(hub: Hub, releases: Releases) -> None:
    hub.fault_in["/api/repos/create"] = [
        Fault(HTTPStatus.SERVICE_UNAVAILABLE),
        Fault(HTTPStatus.INTERNAL_SERVER_ERROR),
        Fault(HTTPStatus.TOO_MANY_REQUESTS, retry_after=17),
        Fault(ends="work"),
    ]
    waits: list[float] = []
    notes: list[str] = []
    releases.push("one", retries=Retries(sleep=waits.append, note=notes.append))
    assert waits == [1, 2, 17, 8]
    assert notes[0] == "the Hub answered 503; trying again in 1 s"


def test_a_requested_wait_of_an_hour_is_an_error(hub: Hub, releases: Releases) -> None:
    hub.fault_in["/api/repos/create"] = [Fault(HTTPStatus.TOO_MANY_REQUESTS, retry_after=3600)]
    waits: list[float] = []
    with pytest.raises(StageError, match="429"):
        releases.push("one", retries=Retries(sleep=waits.append))
    assert waits == []


def test_permanent_failures_are_not_retried(hub: Hub, releases: Releases) -> None:
    waits: list[float] = []
    with pytest.raises(StageError, match="rights"):
        releases.push("one", repo="somebody-else/model", retries=Retries(sleep=waits.append))
    assert waits == []


def test_an_unreachable_hub_is_one_error_message(releases: Releases, hub: Hub) -> None:
    hub.url = "http://127.0.0.1:9"  # the discard port, without a server
    waits: list[float] = []
    with pytest.raises(StageError) as caught:
        releases.push("one", retries=Retries(sleep=waits.append))
    assert waits == [1, 2, 4, 8, 16, 32]
    assert "\n" not in str(caught.value)


def test_no_message_contains_the_token_or_the_signature_of_an_address(
    hub: Hub, releases: Releases, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault_in["PUT /lfs/"] = [Fault(HTTPStatus.SERVICE_UNAVAILABLE)] * 99
    notes: list[str] = []
    with pytest.raises(StageError, match="/lfs/") as caught:
        releases.push("one", retries=Retries(sleep=lambda seconds: None, note=notes.append))
    message = "".join([str(caught.value), *notes, *capfd.readouterr(), caplog.text])
    assert TOKEN not in message
    assert SIGNATURE.partition("=")[2] not in message


def test_a_request_to_stop_ends_the_wait_before_a_retry(hub: Hub, releases: Releases) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    hub.fault_in["/api/repos/create"] = [Fault(HTTPStatus.SERVICE_UNAVAILABLE)]
    with pytest.raises(KeyboardInterrupt):
        releases.push("one", retries=Retries(sleep=stop))
    assert releases.push("one").digest == digest_of("one")


def pushes_with_random_faults(hub: Hub, releases: Releases, count: int) -> dict[str, int]:
    """Pushes `count` releases as a run does, each with faults from a random request on; a second run must complete what the
    first did not. Returns how many pushes met their fault, failed at first, and how many requests there were.
    """
    numbers, figures = random.Random(5), {"met a fault": 0, "failed at first": 0}
    versions: dict[tuple[str, str], list[str]] = {}
    for number in range(count):
        version = f"release-{number}"
        way = numbers.choice(["main", "main", "dev", "pull request"])
        repo, tag = f"{OWNER}/model-{number % 5}", f"v{number}" if way != "pull request" and numbers.random() < 0.5 else None
        fields = {"repo": repo, "tag": tag, "pull_request": way == "pull request", "branch": "dev" if way == "dev" else "main"}
        stage = Publish.model_validate({"model": "base", **fields})
        folder = releases.make(version)["README.md"].parent
        first = hub.arrived + numbers.randrange(REQUESTS + (tag is not None))
        last = first + numbers.choice([1, 1, 1, 2, 8, 200])
        hub.fault_at = dict.fromkeys(range(first, last), numbers.choice(FAULTS))
        complete = False
        for attempt in range(2):  # as two runs of the same recipe do
            effect = stage.effect(folder, digest=digest_of(version), receipts=releases.receipts)
            assert effect is not None and effect.act is not None
            waiting = len(hub.fault_at)
            try:
                effect.act(EffectContext(sleep=lambda seconds: None))
                complete = True
            except StageError:
                figures["failed at first"] += 1
            figures["met a fault"] += attempt == 0 and len(hub.fault_at) < waiting
            hub.fault_at = {}
            if complete:
                break
        assert complete, version
        assert stage.effect(folder, digest=digest_of(version), receipts=releases.receipts) is None
        assert stage.target is not None
        receipt = Journal.read(releases.receipts, stage.target).last
        assert receipt is not None
        assert held_by(hub, receipt.commit, repo) == releases.content(version)
        assert tag is None or held_by(hub, tag, repo) == releases.content(version)
        versions.setdefault((repo, way), []).append(version)
    for repo, repository in hub.repositories.items():
        pushed = [version for (name, _), those in versions.items() if name == repo for version in those]
        begun, *others = repository.commits.values()
        assert set(begun.files) == {MADE_BY_THE_HUB}
        assert sorted(commit.summary for commit in others) == sorted(
            f"Release {digest_of(version)[:12]}" for version in pushed
        )
        whole = [releases.content(version) for version in pushed]
        assert all(held_by(hub, commit.oid, repo) in whole for commit in others)
    return figures


def test_12_pushes_with_a_fault_each_end_complete(hub: Hub, releases: Releases) -> None:
    figures = pushes_with_random_faults(hub, releases, 12)
    assert figures["met a fault"] == 12
    assert figures["failed at first"] >= 1


@pytest.mark.long
def test_200_pushes_with_a_fault_each_end_complete(hub: Hub, releases: Releases) -> None:
    figures = pushes_with_random_faults(hub, releases, 200)
    print(figures, f"{hub.arrived} requests")
    assert figures["met a fault"] == 200
    assert figures["failed at first"] >= 20
