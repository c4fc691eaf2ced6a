"""`noetherperf view`: a page in the browser that shows records, live or as one file."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from noetherperf.cli.errors import clean_errors, fail, first_line
from noetherperf.cli.files import local, local_each, report_files

__all__ = ["view"]


def view(
    records: Annotated[
        list[Path],
        typer.Argument(
            callback=local_each,
            help="Folders of records, such as runs/digits/record.zarr. Several are shown side by side.",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(callback=local, help="Write the page as one file, which needs no server and no network, and end."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine's loopback interface; 0: a free one.")
    ] = 0,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in the default browser.")] = False,
) -> None:
    """Show records in the browser, also while training writes them.

    The page is for this machine alone, and follows a record that grows. Ctrl-C ends it.
    """
    with clean_errors():
        from noetherperf.view import Answers, PageServer, export

        if html is not None:
            export(records, html, progress=True)
            report_files([html])
            return
        answers = Answers(records)
        try:
            server = PageServer(answers, port)
        except OSError as error:
            fail(
                f"--port: {port} cannot be used ({first_line(error)}); choose another one, or leave --port out for a "
                "free one"
            )
        with server:
            print(
                f"{server.url} shows {len(answers.runs)} record{'s' * (len(answers.runs) > 1)}; Ctrl-C ends it",
                flush=True,
            )
            if open_it:
                webbrowser.open(server.url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("the page has ended")
