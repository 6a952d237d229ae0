"""llama.cpp with the model of a GGUF file, in a process that can be ended.

It has an engine of its own for chat templates, runs that of the file as soon as it opens it, and bounds neither its time nor
its memory. A process can be bounded from outside. It serves on the loopback interface, says where, and ends with its input.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import weakref
from pathlib import Path

from llm.errors import InputError

OPENING_SECONDS, OPENED_A_SECOND = 60.0, 20e6  # and bytes of the file
MEMORY = 4 << 30  # bytes beside twice those of the file, in address space: buffers for logits of 2,048 positions, threads


class LlamaCppProcess:
    """The process; InputError if it does not open the file in time. It ends with this object."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        """`context` is the longest sequence."""
        told, tells = os.pipe()
        with os.fdopen(told, "rb") as reading:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(path), str(context), str(threads), str(tells)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[tells],
                env=os.environ | {"PYTHONSAFEPATH": "1"},
            )
            os.close(tells)
            weakref.finalize(self, _end, self._process)
            seconds = OPENING_SECONDS + path.stat().st_size / OPENED_A_SECOND
            line = reading.readline() if select.select([reading], [], [], seconds)[0] else b""
        if not line:
            self.close()
            raise InputError(
                f"{path.name}: expected a file that llama.cpp opens within {seconds:.0f} s and the memory of its size, "
                "got one "
                "that takes more"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"{path.name}: expected a file that llama.cpp opens, got an error: {answer['error']}")
        self.address: str = answer["address"]

    def close(self) -> None:
        """Ends the process."""
        _end(self._process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def main() -> None:
    """Opens the file, writes the address to the pipe that the command line names, and serves until the input ends."""
    import xllamacpp

    path, context, threads, tells = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = mapped + 2 * path.stat().st_size + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = params.fit_params = params.ui = False
    params.verbosity = 0  # errors only
    try:
        server = xllamacpp.Server(params)
        answer = {"address": server.listening_address}
    except RuntimeError as error:
        answer = {"error": str(error)}
    with os.fdopen(tells, "w") as telling:
        telling.write(json.dumps(answer) + "\n")
    sys.stdin.buffer.read()
    os._exit(0)  # a server that is dropped while it works waits for ever


if __name__ == "__main__":
    main()
