"""A process that may take only a little more memory than it has: what takes more really fails."""

import contextlib
import resource
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Inside, this process may take `size` bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
