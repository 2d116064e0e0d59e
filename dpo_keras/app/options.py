"""Options that several commands take, each with one name, one rule and one line of help."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PairLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Read this many pairs at most.")
]
