"""The client of `switchkd serve`: what `ColocatedVllm` does here, asked of a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from switchkd.errors import UserError
from switchkd.records import Prompt
from switchkd.serving.call import Call
from switchkd.serving.connection import Connection
from switchkd.serving.server import KEY_ENV, MORE_WEIGHTS, PROTOCOL, ROLLOUTS, STATE, WEIGHTS, request_to
from switchkd.serving.started import started_of
from switchkd.settings.typed import typed


class RemoteVllm:
    """A server of `switchkd serve`. The key, if it wants one, is in SWITCHKD_SERVE_KEY.

    A request that gets no answer is sent again, `retries` times, see `Connection`; it gives the same tokens. A call may take up
    to `timeout` seconds. Raises UserError for an address that is none, and Unreachable where the server is gone.
    """

    def __init__(self, url: str, *, retries: int = 4, timeout: float = 3600.0) -> None:
        self._server = Connection(url, KEY_ENV, retries=retries, timeout=timeout)
        self.url = self._server.url
        found = self._server.json(STATE)
        if found.get("protocol") != PROTOCOL:
            raise UserError(
                f"{self.url} speaks protocol {found.get('protocol')}, not {PROTOCOL}; install one switchkd on both"
            )
        self.started = started_of(found)
        self._most_weights = typed("the server's most_weights", found.get("most_weights"), int | None)

    def rollouts(
        self, prompts: Sequence[Prompt], call: Call, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """See `Backend`. `on_progress` is told once, at the end."""
        body = self._server.ask(ROLLOUTS, request_to(call, list(prompts), seed))
        try:
            answer = load(body)
        except SafetensorError as error:
            raise UserError(
                f"the answer of {self.url} cannot be read ({error}); is it a server of switchkd?"
            ) from error
        if on_progress:
            on_progress(len(prompts))
        return answer

    def load(self, path: Path) -> int:
        """See `Backend`. Raises UserError for weights that the server would not take."""
        size, most = path.stat().st_size, self._most_weights
        if most is not None and size > most:
            # A server that refuses closes the connection, so that whoever still sends does not hear why.
            raise UserError(f"the student's weights are {size} bytes, and {self.url} takes {most}; {MORE_WEIGHTS}")
        version = self._server.json(WEIGHTS, path).get("version")
        if not isinstance(version, int):
            raise UserError(f"{self.url} did not say which version its weights are; is it a server of switchkd?")
        return version
