"""Trying again what failed for a reason that may pass: a Hub that is busy or broken for a moment, a connection that ended.

What is tried again has to look first at what the attempt before it achieved; nothing here knows what that is.
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

from runner import credentials
from runner.credentials import redact
from runner.errors import StockpotError
from runner.files import DISK_FULL

T = TypeVar("T")

REQUEST_TIMEOUT, CHANGED_MEANWHILE, TOO_MANY_REQUESTS, SERVER_ERROR = 408, 412, 429, 500
FAULTS_OF_OURS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError, PermissionError)
QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+")  # where upload addresses carry their signature


def _silent(sentence: str) -> None:
    pass


@dataclass(frozen=True)
class Retries:
    """How often, and after which waits, something is tried again."""

    waits: tuple[float, ...] = (1, 2, 4, 8, 16, 32)  # seconds, one for each further attempt
    longest: float = 330.0  # seconds that a server may ask for; the Hub counts requests over 5 minutes
    sleep: Callable[[float], None] = time.sleep
    note: Callable[[str], None] = _silent  # told of each wait


PATIENT = Retries()  # a minute beside what the client of the Hub tries again by itself


def attempted(work: Callable[[], T], retries: Retries) -> T:
    """What `work` returns, called again while it fails for reasons that may pass; the last error if they do not."""
    for wait in retries.waits:
        try:
            return work()
        except StockpotError:
            raise
        except Exception as error:  # whatever the client and the layers below it raise
            asked = _asked_wait(error)
            if not _may_pass(error) or (asked or 0) > retries.longest:
                raise
            seconds = wait if asked is None else asked
            retries.note(f"{_briefly(error)}; trying again in {seconds:g} s")
            retries.sleep(seconds)
    return work()


def told(error: BaseException) -> str:
    """An error and what it came from, on one line, without tokens and without the signatures of addresses."""
    sentence = " ".join(f"{type(error).__name__}: {error}".split())
    text = f"{sentence} Cause: {told(error.__cause__)}" if error.__cause__ else sentence
    text = QUERY.sub(r"\1?...", redact(text))
    secret = credentials.token()
    return text.replace(secret, "***") if secret else text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the Hub's client from writing to the terminal: its warnings show addresses with signatures."""
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
    """The Hub's answer behind an error, if there was one."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((one.response for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (response := _response(error)) is not None:
        status = int(response.status_code)
        return status in (REQUEST_TIMEOUT, CHANGED_MEANWHILE, TOO_MANY_REQUESTS) or status >= SERVER_ERROR
    chain = list(_chain(error))
    if any(isinstance(one, OSError) and one.errno in DISK_FULL for one in chain):
        return False
    return not any(isinstance(one, (*FAULTS_OF_OURS, OfflineModeIsEnabled)) for one in chain)


def _asked_wait(error: BaseException) -> float | None:
    """Seconds that the answer asks to wait (RFC 9110, 10.2.3); none after a race, which is looked at again at once."""
    response = _response(error)
    if response is None:
        return None
    if response.status_code == CHANGED_MEANWHILE:
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
    return f"the Hub answered {response.status_code}" if response is not None else told(error)
