"""The command that serves the inspector."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("inspect")
def inspect_command(
    results: Annotated[Path, typer.Argument(help="Folder of runs, or of one run.")] = Path("results"),
    host: Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 open it to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 7860,
    model: Annotated[str, typer.Option(help="Generator of the live page: of the zoo, a folder, a name.")] = (
        "infinity-shapes"
    ),
    fitted: Annotated[list[Path] | None, typer.Option(help="Fitted parameters for the live page; repeatable.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = False,
) -> None:
    """Look at results in the browser, and steer a generator with sliders.

    pysteer inspect, pysteer inspect results/sweep --port 0, pysteer inspect --model diffusion-shapes --fitted folder
    """
    from pysteer.app.live import Live
    from pysteer.app.server import LOOPBACK, Inspector, serve
    from pysteer.app.store import Results

    hosts = LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else ("*",)

    def opened(address: str) -> None:
        typer.echo(f"inspecting {results} at {address} (stop with Ctrl-C)")
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve(Inspector(Results(results), Live(model, fitted or ()), hosts), host, port, opened)
