"""Retries after temporary failures of the Hub: too many requests, server errors, broken connections.

The work that is retried must first check what the attempt before it achieved.
"""

import contextlib
import datetime
import email.utils
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from runner.credentials import redact
from runner.errors import StockpotError
from runner.files import DISK_FULL

T = TypeVar("T")

REQUEST_TIMEOUT, PRECONDITION_FAILED, TOO_MANY_REQUESTS, SERVER_ERROR = 408, 412, 429, 500
LOCAL_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError, PermissionError)
QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+")  # upload addresses have their signature there


@dataclass(frozen=True)
class Retries:
    """How often to retry, and how long to wait before each attempt."""

    waits: tuple[float, ...] = (1, 2, 4, 8, 16, 32)  # seconds, one for each further attempt
    longest: float = 330.0  # seconds that a server may ask for; the Hub's rate limit covers 5 minutes
    sleep: Callable[[float], None] = time.sleep
    note: Callable[[str], None] = lambda message: None  # gets a message before each wait


DEFAULT_RETRIES = Retries()  # a minute, in addition to the retries of the Hub's client


def with_retries(work: Callable[[], T], retries: Retries) -> T:
    """The result of `work`, called again after temporary failures; raises the last error."""
    for wait in retries.waits:
        try:
            return work()
        except StockpotError:
            raise
        except Exception as error:  # the client and the layers below it may raise anything
            requested = _requested_wait(error)
            if not _is_temporary(error) or (requested or 0) > retries.longest:
                raise
            seconds = wait if requested is None else requested
            retries.note(f"{_briefly(error)}; trying again in {seconds:g} s")
            retries.sleep(seconds)
    return work()


def describe(error: BaseException) -> str:
    """An error and its causes on one line, without tokens and signatures of addresses."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if error.__cause__:
        text = f"{text} Cause: {describe(error.__cause__)}"
    return QUERY.sub(r"\1?...", redact(text))


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Silences the Hub's client, whose warnings show addresses with signatures."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: BaseException) -> Any:
    """The Hub's response behind an error, if any."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause.response for cause in _chain(error) if isinstance(cause, HfHubHTTPError)), None)


def _is_temporary(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (response := _response(error)) is not None:
        status = int(response.status_code)
        return status in (REQUEST_TIMEOUT, PRECONDITION_FAILED, TOO_MANY_REQUESTS) or status >= SERVER_ERROR
    chain = list(_chain(error))
    if any(isinstance(cause, OSError) and cause.errno in DISK_FULL for cause in chain):
        return False
    return not any(isinstance(cause, (*LOCAL_ERRORS, OfflineModeIsEnabled)) for cause in chain)


def _requested_wait(error: BaseException) -> float | None:
    """Seconds that the response asks to wait (RFC 9110, 10.2.3); 0 after a race with another push."""
    response = _response(error)
    if response is None:
        return None
    if response.status_code == PRECONDITION_FAILED:
        return 0.0
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())


def _briefly(error: BaseException) -> str:
    response = _response(error)
    return f"the Hub answered {response.status_code}" if response is not None else describe(error)
