"""What is printed: names, notes of other machines, logs, rows and errors may hold escape sequences, which a terminal obeys.

Every control character is written out, as \\u001b, and so are those that turn the direction of text around. Output of `rich`
goes through `console`, which does the same to texts and leaves colours.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with its control characters written out, in a form that JSON and TOML read too."""
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class PrintableStream:
    """A text stream that writes only what is printable to another, and is that stream in everything else."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes the printable form of `text`."""
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Makes standard output and standard error such streams."""
    found = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PrintableStream(found[0]), PrintableStream(found[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = found


def console(stream: IO[str], **options: Any) -> "Console":
    """A console of `rich` whose texts are printable and are never read as its markup."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return PrintableConsole(file=getattr(stream, "stream", stream), markup=False, highlight=False, emoji=False, **options)
