"""The pages of `run serve` and `run report` in a real Chromium: wide, on a phone, in dark mode and in print.

Marked long, since it drives real pages and runs the quickstart for the report. tests/support/browser.py says what it needs.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from random_model import random_model
from served import serving

from llm.inference.chat_session import ChatSession
from llm.inference.sampling import Sampling
from runner.cli import main
from runner.serving.server import ServerConfig

if TYPE_CHECKING:
    from browser import Watched
    from playwright.sync_api import Browser

pytestmark = pytest.mark.long

TEXTS = ["What is asthma? Asthma is a disease of the lungs.", "高血压是什么？高血压是一种病。"] * 20
QUESTION = "什么是高血压？ And <b>asthma</b>?"
QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.toml"
# Points of arrows that lie inside a box, its edge and its head left out.
HIDDEN = """() => {
  const boxes = [...document.querySelectorAll(".graph rect")].map(box => box.getBoundingClientRect());
  let found = 0;
  for (const arrow of document.querySelectorAll(".graph path[marker-end]")) {
    const matrix = arrow.getScreenCTM();
    for (let at = 0; at < arrow.getTotalLength(); at += 2) {
      const { x, y } = arrow.getPointAtLength(at).matrixTransform(matrix);
      found += boxes.some(box => x > box.left + 2 && x < box.right - 2 && y > box.top + 2 && y < box.bottom - 2);
    }
  }
  return found;
}"""
SIZES = {"wide": (1200, 800), "phone": (400, 800)}


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatSession]:
    """Two models with random weights and a long context."""
    folder = tmp_path_factory.mktemp("sessions")
    return {
        name: ChatSession(random_model(folder / name, TEXTS, 400, seed=seed, hidden_size=32, context=8192))
        for seed, name in enumerate(("base", "tuned"))
    }


def settings(key: str | None = None) -> ServerConfig:
    return ServerConfig(sampling=Sampling(temperature=0.0), max_new_tokens=16, api_key=key)


@pytest.fixture(scope="module")
def address(sessions: dict[str, ChatSession]) -> Iterator[str]:
    with serving(sessions, settings()) as found:
        yield found


def say(watched: "Watched", text: str, *, tokens: int) -> None:
    watched.page.fill("#tokens", str(tokens))
    watched.page.fill("#text", text)
    watched.page.press("#text", "Enter")


def until_begun(watched: "Watched") -> None:
    watched.page.locator("li.assistant", has_text=re.compile("....")).first.wait_for()


def until_answered(watched: "Watched") -> list[str]:
    watched.page.wait_for_selector("#send:visible")
    return watched.page.locator("li.assistant").all_inner_texts()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_two_models_answer_side_by_side(browser: "Browser", address: str, size: str, dark: bool) -> None:
    from browser import Watched

    watched = Watched(browser, address, size=SIZES[size], dark=dark)
    page = watched.page
    page.wait_for_selector("section")
    assert page.locator("h2").all_inner_texts() == ["base", "tuned"]
    say(watched, QUESTION, tokens=24)
    answers = until_answered(watched)
    assert page.locator("li.user").all_inner_texts() == [QUESTION] * 2, "text stays text, Chinese and tags as well"
    assert len(answers) == 2 and all(len(answer) > 5 for answer in answers) and answers[0] != answers[1]
    say(watched, "again", tokens=200)
    until_answered(watched)
    form, last = page.locator("form#ask").bounding_box(), page.locator("li.assistant").last.bounding_box()
    assert form is not None and last is not None
    assert form["y"] + form["height"] <= SIZES[size][1] and last["y"] + last["height"] <= form["y"], "the answer is in view"
    assert watched.overflows() <= 0
    assert watched.faults == []
    page.close()


def test_an_answer_streams_and_stop_ends_it(browser: "Browser", address: str) -> None:
    from browser import Watched

    watched = Watched(browser, address)
    page = watched.page
    page.wait_for_selector("section")
    say(watched, QUESTION, tokens=4000)
    until_begun(watched)
    early = page.locator("li.assistant").first.inner_text()
    page.click("#stop")
    answers = until_answered(watched)
    assert len(early) <= len(answers[0]) < 4000
    assert page.locator("li.stopped").count() == 2
    say(watched, "and now?", tokens=8)
    until_answered(watched)
    assert page.locator("li.fault").count() == 0, "what was stopped does not stand in the way"
    assert watched.faults == []
    page.close()


def test_a_new_conversation_during_an_answer_starts_empty(browser: "Browser", address: str) -> None:
    from browser import Watched

    watched = Watched(browser, address)
    page = watched.page
    page.wait_for_selector("section")
    say(watched, QUESTION, tokens=4000)
    until_begun(watched)
    page.click("#new")
    page.wait_for_selector("#send:visible")
    assert page.locator("li").count() == 0
    assert page.evaluate("columns.map(column => column.messages.length)") == [0, 0]
    assert watched.faults == []
    page.close()


def test_a_server_with_a_key_asks_for_it(browser: "Browser", sessions: dict[str, ChatSession]) -> None:
    from browser import Watched

    with serving(sessions, settings("not-a-secret")) as address:
        watched = Watched(browser, address)
        page = watched.page
        page.wait_for_selector("#key:visible")
        assert "API key" in page.inner_text("main")
        page.fill("#key", "not-a-secret")
        page.press("#key", "Enter")
        page.wait_for_selector("section")
        say(watched, QUESTION, tokens=8)
        assert len(until_answered(watched)) == 2
        assert len(watched.faults) == 1 and "401" in watched.faults[0], "which the browser tells of the first request"
        page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a quickstart run."""
    folder = tmp_path_factory.mktemp("report")
    place = ["--cache", str(folder / "cache")]
    subprocess.run([sys.executable, "-m", "runner.cli", str(QUICKSTART), *place], check=True)
    assert main(["report", str(QUICKSTART), *place, "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_a_report_fits_its_window_and_loads_nothing(browser: "Browser", report: Path, size: str, dark: bool) -> None:
    from browser import Watched

    watched = Watched(browser, report.as_uri(), size=SIZES[size], dark=dark)
    page = watched.page
    assert watched.overflows() <= 0, "what is wider scrolls by itself"
    cut = "all => all.filter(one => one.parentElement.scrollWidth > one.parentElement.clientWidth).length"
    assert page.locator("table").evaluate_all(cut) == 0
    assert page.locator(".hint").is_visible() == (size == "phone"), "of the graph, which is wider"
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert shade == ("rgb(24, 24, 27)" if dark else "rgb(255, 255, 255)")
    assert page.locator(".graph rect").count() == 13
    assert page.locator(".plots svg").count() == 16, "four curves of four trainings, the trunk one of them"
    small = page.locator(".graph text").evaluate_all("all => Math.min(...all.map(one => one.getBoundingClientRect().height))")
    assert small > 8, "pixels: what boxes say can be read"
    assert watched.faults == []
    page.close()


def test_no_arrow_of_a_report_is_hidden_by_a_box(browser: "Browser", report: Path) -> None:
    from browser import Watched

    watched = Watched(browser, report.as_uri())
    hidden = watched.page.evaluate(HIDDEN)
    assert hidden == 0
    watched.page.close()


def test_a_printed_report_shows_folded_sections(browser: "Browser", report: Path, tmp_path: Path) -> None:
    from browser import Watched

    page = Watched(browser, report.as_uri()).page
    wrong = page.locator("details td").first
    assert not wrong.is_visible()
    page.emulate_media(media="print")
    assert wrong.is_visible()
    assert page.pdf().startswith(b"%PDF")
    page.close()
