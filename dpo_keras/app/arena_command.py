"""`dpo-keras arena`: people ask, two responses appear, and the choice becomes a preference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_keras.app.console import AsJson, Debug, reporting, working
from dpo_keras.app.feedback_commands import (
    announcement,
    base_url,
    keys_for_arguments,
    make_links,
    needs_extra,
    read_text,
    tell_of_links,
)

if TYPE_CHECKING:
    from dpo_keras.feedback import Store


def arena(  # noqa: PLR0913, PLR0917 (a parameter is an option)
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, model directories, presets or SavedModels. One answers twice; of more than "
            "two, two are drawn for each query.",
        ),
    ],
    store: Annotated[Path, typer.Option(help="The SQLite file that keeps the round.")] = Path(
        "feedback.sqlite"
    ),
    annotator: Annotated[
        list[str] | None,
        typer.Option(
            "--annotator", "-a", help="NAME or NAME:GROUP, repeatable. Default: one, `annotator`."
        ),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Give new links to known annotators and end old ones."),
    ] = False,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many people may judge the same pair. Default: as the store has it, or 1.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Default: the run's evaluation section, or 1.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the probability to sample from.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the run's evaluation section, or 64.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template of policies that are no runs.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help=r"What stands around a query, for policies without a template: "
            r"'\n\nHuman: {query}\n\nAssistant:'. With it a conversation can go on."
        ),
    ] = None,
    guidelines: Annotated[
        Path | None, typer.Option(help="Markdown that the page shows to annotators.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    url: Annotated[
        str | None, typer.Option(help="How annotators reach the page, where that differs.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve a page on which people ask and choose between two responses, until Ctrl-C."""
    with reporting(as_json, debug) as terminal:
        needs_extra()
        from dpo_keras.feedback import open_store
        from dpo_keras.feedback.annotation_server import bind, run
        from dpo_keras.feedback.arena import Arena
        from dpo_keras.feedback.arena_server import Turns, make_arena_app
        from dpo_keras.feedback.quality import overview
        from dpo_keras.feedback.request_guard import address_of

        address = address_of(host, url)
        with keys_for_arguments("guidelines:"):
            shown = "" if guidelines is None else read_text(guidelines)
        # Before anybody waits for TensorFlow.
        framed = Turns(form=None if form is None else form.replace("\\n", "\n")).form
        with bind(host, port) as listening:
            if store.exists():
                open_store(store).close()  # a wrong one is refused now, a new one made later
            with working(terminal) as progress:
                from dpo_keras.app.arena_policies import Decoding, open_responders

                decoding = Decoding(temperature, top_p, max_new_tokens)
                policies = open_responders(runs, decoding, template, progress)
            Turns(form=framed, messages=any(one.template for one in policies))
            turns = Turns(form=framed, messages=all(one.reads_messages for one in policies))
            round = _open(store, overlap)
            queries = Arena(round, policies)
            try:
                base = base_url(url, host, listening)
                links = make_links(round, annotator or [], renew, base)
                if not turns.go_on:
                    terminal.say(
                        "Each query stands alone: without a chat template, conversations go on "
                        "with --form only."
                    )
                tell_of_links(terminal, store, round, links, encrypted=address.encrypted(host))
                page = make_arena_app(
                    queries, turns, guidelines=shown, assess=overview, address=address
                )
                run(page, listening, announcement(terminal, base, links))
            finally:
                queries.close()
                round.close()


def _open(path: Path, overlap: int | None) -> Store:
    """Open a round, of which only the overlap changes, or begin one."""
    from dpo_keras.feedback import Settings, open_store

    if not path.exists():
        settings = Settings(overlap=overlap or 1, gold_share=0.0, repeat_share=0.0)
        return open_store(path, settings, create=True)
    round = open_store(path)
    if overlap in (None, round.settings.overlap):
        return round
    settings = replace(round.settings, overlap=overlap)
    round.close()
    return open_store(path, settings)
