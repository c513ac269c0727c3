"""The command that serves rollouts of a pair by vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rich.text import Text

from switchkd.cli.help import DEVICE, MODELS, option
from switchkd.cli.options import new_console, with_options
from switchkd.errors import UserError

_SERVER, _PORT = "Server", 8377


@dataclass(frozen=True)
class Serving:
    """The options of the command; see `with_options`."""

    teacher: Annotated[str, option(MODELS, "MODEL", "The teacher: a folder, or a name on the hub.")]
    student: Annotated[str, option(MODELS, "MODEL", "The student, its draft model; training sends new weights.")]
    host: Annotated[str, option(_SERVER, "ADDRESS", "Where to listen; for others, set SWITCHKD_SERVE_KEY.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, option(_SERVER, "N", "The port; 0 is any.", min=0, max=65535)] = _PORT
    block_size: Annotated[
        int, option(_SERVER, "N", "Tokens drafted before the teacher is asked; changes no token.", min=1)
    ] = 4
    max_rows: Annotated[int, option(_SERVER, "N", "Rollouts in flight; changes no token.", min=1)] = 64
    max_tokens: Annotated[int, option(_SERVER, "N", "Longest prompt and response together.", min=2)] = 1024
    cache_gib: Annotated[float, option(DEVICE, "GIB", "Memory of both models' caches.")] = 1.0
    weights_gib: Annotated[float, option(DEVICE, "GIB", "Largest student that training may send.")] = 16.0
    dtype: Annotated[str, option(DEVICE, "TYPE", "Type of both models' weights: float32, bfloat16, auto.")] = "float32"


@with_options
def serve(given: Serving) -> None:
    """Serve rollouts of a teacher and a student by vLLM, to a run whose `vllm` is this server's address."""
    from switchkd.models.sources import find_source
    from switchkd.serving.colocated import ColocatedVllm, VllmOptions
    from switchkd.serving.server import KEY_ENV, RolloutServer
    from switchkd.web import key_in

    if not given.weights_gib > 0:
        raise UserError(f"weights_gib is {given.weights_gib}; it has to be above 0")
    options = VllmOptions(given.block_size, given.max_rows, given.max_tokens, given.dtype, given.cache_gib)
    sources = [find_source(name) for name in (given.teacher, given.student)]
    if packed := [
        name for name, source in zip((given.teacher, given.student), sources, strict=True) if source.gguf_file
    ]:
        raise UserError(f"model {packed[0]!r} is a .gguf file, and vLLM reads folders; save it to one first")
    console = new_console()
    with console.status("vLLM starts ..."):
        backend = ColocatedVllm(sources[0].place, sources[1].place, options)
    most = int(given.weights_gib * 2**30)
    with RolloutServer(backend, given.host, given.port, key=key_in(KEY_ENV), most_weights=most) as server:
        console.print(Text(f"serving at http://{given.host}:{server.port}; stop with Ctrl-C"), soft_wrap=True)
        server.serve_forever()
