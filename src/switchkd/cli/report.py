"""The command that makes a page of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from switchkd import __version__
from switchkd.cli.help import OUTPUT, option
from switchkd.cli.options import new_console

_FOLLOW = "Follow"
_PORT = 8765


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or .jsonl files of rollouts.")],
    output: Annotated[
        Path | None,
        option(
            OUTPUT,
            "FILE",
            "The page; by default report.html in the run's folder, or here for several.",
            "--output",
            "-o",
        ),
    ] = None,
    rollouts: Annotated[
        int, option(OUTPUT, "N", "Most rollouts on the page, taken evenly from all there are.", min=0)
    ] = 200,
    follow: Annotated[
        bool, option(_FOLLOW, "", "Serve the page to this machine and keep it up to date.", "--follow")
    ] = False,
    port: Annotated[int, option(_FOLLOW, "N", "Port of --follow on 127.0.0.1; 0 is any.", min=0, max=65535)] = _PORT,
) -> None:
    """Make one HTML page of runs: settings, curves, scores, and their rollouts token by token."""
    from switchkd.files import write_atomically
    from switchkd.report.page import page
    from switchkd.run.gathered import gather, sources_of

    console = new_console()
    sources = sources_of(runs)
    if follow:
        _follow(runs, rollouts, port)
        return
    alone = len(runs) == 1 and runs[0].is_dir()
    path = output or (runs[0] / "report.html" if alone else Path("report.html"))
    write_atomically(path, page(gather(sources, most_rollouts=rollouts, version=__version__)))
    console.print(Text(f"the report is in {path}; open it in a browser"), soft_wrap=True)


def _follow(runs: list[Path], rollouts: int, port: int) -> None:
    from switchkd.run.follow import HOST, FollowServer
    from switchkd.run.gathered import files_read, gather, sources_of

    def data() -> dict[str, object]:
        # A folder of runs may have got another one.
        return {**gather(sources_of(runs), most_rollouts=rollouts, version=__version__, follow=True)}

    with FollowServer(port, data, lambda: files_read(sources_of(runs))) as server:
        place = f"http://{HOST}:{server.port}/"
        new_console().print(Text(f"following at {place}; stop with Ctrl-C"), soft_wrap=True)
        server.serve_forever()
