"""The commands of human feedback: the annotation page, its report, its pairs for training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_keras.app.console import (
    AsJson,
    Debug,
    Force,
    Overrides,
    Silent,
    Terminal,
    TerminalProgress,
    check_output,
    reporting,
    working,
)
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON
from dpo_keras.utils.deferred_imports import deferred_function

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from dpo_keras.feedback import Candidates, Imported, Store

read_text = deferred_function("dpo_keras.app.config", "read_text")
add_most_useful = deferred_function("dpo_keras.app.pair_selection", "add_most_useful")
check_selection = deferred_function("dpo_keras.app.pair_selection", "check_selection")
keys_for_arguments = deferred_function("dpo_keras.app.config_rules", "keys_for_arguments")

feedback = typer.Typer(
    help="Look at judgements, let programs judge, and make training pairs of both.",
    no_args_is_help=True,
)

StoreFile = Annotated[Path, typer.Argument(metavar="STORE", help="The SQLite file of a round.")]


def annotate(  # noqa: PLR0913, PLR0917 (a parameter is an option)
    candidates: Annotated[
        Path, typer.Argument(metavar="CANDIDATES", help="JSONL from `dpo-keras generate`.")
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
    overlap: Annotated[int, typer.Option(min=1, help="How many people judge each pair.")] = 1,
    selection: Annotated[
        str | None,
        typer.Option(
            help="Which pairs come first: random, uncertain, disagreement or diverse. Default: "
            "uncertain with --policy, else random."
        ),
    ] = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(help="A run that the selection goes by; repeatable for disagreement."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Add only this many new pairs. Default: all.")
    ] = None,
    guidelines: Annotated[
        Path | None, typer.Option(help="Markdown that the page shows to annotators.")
    ] = None,
    gold_share: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of hidden checks (`gold` in CANDIDATES).")
    ] = 0.05,
    repeat_share: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of pairs shown a second time.")
    ] = 0.03,
    rank: Annotated[
        bool,
        typer.Option("--rank", help="Show 3 to 5 responses of a prompt at once, to be ranked."),
    ] = False,
    lease_minutes: Annotated[
        float, typer.Option(min=0.1, help="After this an abandoned pair goes to others.")
    ] = 30.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    url: Annotated[
        str | None, typer.Option(help="How annotators reach the page, where that differs.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve the page on which people choose between responses, until Ctrl-C."""
    with reporting(as_json, debug) as terminal:
        needs_extra()
        from dpo_keras.feedback import Settings, open_store, read_candidates
        from dpo_keras.feedback.annotation_server import bind, make_app, run
        from dpo_keras.feedback.quality import overview
        from dpo_keras.feedback.request_guard import address_of

        selection = selection or ("uncertain" if policy else "random")
        check_selection(selection, policy or ())
        address = address_of(host, url)
        with keys_for_arguments("guidelines:"):
            shown = "" if guidelines is None else read_text(guidelines)
        given = read_candidates(candidates)
        settings = Settings(
            overlap=overlap,
            lease_seconds=lease_minutes * 60,
            gold_share=gold_share,
            repeat_share=repeat_share,
            ranking=rank,
        )
        listening = bind(host, port)
        try:
            round = open_store(store, settings, create=True)
            added = _add(terminal, round, candidates, given, selection, policy or (), count)
            del given  # it may be large, and the server runs for weeks
            base = base_url(url, host, listening)
            links = make_links(round, annotator or [], renew, base)
            terminal.say(f"{store}: {added.summary()}.")
            if overlap == 1:
                terminal.say("Each pair is judged once; --overlap 2 lets agreement be measured.")
            tell_of_links(terminal, store, round, links, encrypted=address.encrypted(host))
            page = make_app(round, guidelines=shown, assess=overview, address=address)

            run(page, listening, announcement(terminal, base, links))
            round.close()
        finally:
            listening.close()


@feedback.command("judge")
def feedback_judge(
    store: StoreFile,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with a section `judge`; no other is read.")
    ] = None,
    function: Annotated[
        str | None, typer.Option(help="A Python function that judges, as module:function.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A chat endpoint that judges.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most pairs to ask about.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let a function or a chat model judge the pairs; the same call goes on after a stop."""
    with reporting(as_json, debug) as terminal:
        from dpo_keras.app.judging import judge_store

        given = {"function": function, "url": url, "model": model}
        kind = {"type": "endpoint" if url else "function"} if url or function else {}
        options = {**kind, **{name: value for name, value in given.items() if value is not None}}
        words = [f"judge.{name}={value}" for name, value in options.items()]
        with TerminalProgress(terminal.log) as progress:
            result = judge_store(
                store, config, [*words, *(overrides or [])], limit=limit, progress=progress
            )
        for problem in result["failed"]:
            terminal.say(problem)
        failed = f"; {len(result['failed']):,} could not be judged" if result["failed"] else ""
        terminal.result(result, f"{result['judge']} judged {result['judged']:,} pairs{failed}.")


@feedback.command("report")
def feedback_report(
    store: StoreFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write it here: .html with plots, .json or .txt."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Plots in HTML.")] = True,
    resamples: Annotated[
        int, typer.Option(min=20, help="Bootstrap samples for the intervals.")
    ] = 500,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how good the answers are: agreement, annotators, policies."""
    with reporting(as_json, debug) as terminal:
        needs_extra()
        check_output(output, force, "--output")
        from dpo_keras.feedback import assess, open_store
        from dpo_keras.feedback.quality_report import text, write

        round = open_store(store)
        quality = assess(round, resamples=resamples)
        round.close()
        if output is not None:
            write(quality, output, plots=plots)
        terminal.result(quality.as_dict(), text(quality))
        if output is not None:
            terminal.say(f"The report is in {output}.")


@feedback.command("export")
def feedback_export(
    store: StoreFile,
    pairs: Annotated[
        Path, typer.Argument(metavar="PAIRS", help=".jsonl, .jsonl.gz, .csv or .parquet")
    ],
    label: Annotated[
        str,
        typer.Option(
            help="majority, vote_share or dawid_skene: one pair of all judgements; each: one of "
            "each judgement, so that annotators can be held out."
        ),
    ] = "vote_share",
    ties: Annotated[str, typer.Option(help="half: preference 0.5; drop: left out.")] = "half",
    both_bad: Annotated[str, typer.Option(help="drop: left out; half: as a tie.")] = "drop",
    weights: Annotated[str, typer.Option(help="none, or quality: by annotator.")] = "none",
    rankings: Annotated[
        bool,
        typer.Option("--rankings", help="Write people's rankings instead, as JSONL."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write judgements as preference pairs for `dpo-keras train`."""
    with reporting(as_json, debug) as terminal:
        needs_extra()
        check_output(pairs, force, "PAIRS")
        from dpo_keras.feedback import open_store, to_pairs
        from dpo_keras.feedback.pair_export import write_rankings
        from dpo_keras.preferences import write_preferences

        round = open_store(store)
        if rankings:
            found = write_rankings(round, pairs)
            round.close()
            terminal.result(
                {"path": str(pairs), "rankings": found}, f"{found:,} rankings are in {pairs}."
            )
            return
        made = to_pairs(round, label=label, ties=ties, weights=weights, both_bad=both_bad)
        round.close()
        write_preferences(made.pairs, pairs)
        left_out = ", ".join(f"{count:,} {why}" for why, count in made.dropped.items()) or "none"
        terminal.result(
            {"path": str(pairs), "pairs": len(made.pairs), "dropped": made.dropped},
            f"{len(made.pairs):,} pairs are in {pairs}; left out: {left_out}.",
        )


@feedback.command("backup")
def feedback_backup(
    store: StoreFile,
    copy: Annotated[Path, typer.Argument(metavar="COPY", help="The file that holds the copy.")],
    force: Annotated[bool, typer.Option("--force", help="Replace COPY where it exists.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy a round, which people may be judging, to one file."""
    with reporting(as_json, debug) as terminal:
        from dpo_keras.feedback import open_store

        if copy.exists() and not force:
            raise InputError(f"{copy} exists; give another path, or --force to replace it.")
        round = open_store(store)
        round.backup(copy)
        judgements = round.database.rows("SELECT count(*) FROM judgements")[0][0]
        round.close()
        terminal.result(
            {"path": str(copy)}, f"{copy} holds all of {store}, {judgements:,} entries of the log."
        )


@feedback.command("remove")
def feedback_remove(
    store: StoreFile,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Annotators.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """End annotators' links and sign them out, also while the page is served.

    Their judgements stay. `annotate -a NAME` lets a person in again.
    """
    with reporting(as_json, debug) as terminal:
        from dpo_keras.feedback import open_store

        round = open_store(store)
        for name in names:
            round.remove_annotator(name)
        round.close()
        terminal.result({"removed": names}, f"Removed: {', '.join(names)}. Judgements stay.")


def needs_extra() -> None:
    """Check that the libraries of the page and of the report are installed."""
    names = ("choix", "krippendorff", "markdown_it", "scipy", "starlette", "statsmodels", "uvicorn")
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"human feedback needs {', '.join(missing)}: pip install 'dpo-keras[feedback]'."
        )


def make_links(store: Store, people: list[str], renew: bool, base: str) -> list[dict[str, JSON]]:
    """Add annotators and an administrator; only `renew` makes new links for those known.

    A new link ends the old one, and signs out whoever used it.
    """
    known = store.names_with_links()
    if not people and not known:
        people = ["annotator"]
    asked = [tuple(part.strip() for part in words.partition(":")[::2]) for words in people]
    names = [name for name, _ in asked]
    if "admin" in names:
        raise InputError("the name admin is the administrator's; give another to --annotator.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"--annotator must name each person once; {', '.join(map(repr, twice))} is there twice."
        )
    links: list[dict[str, JSON]] = []
    for name, group in asked:
        link = None
        if renew or name not in known:
            _, token = store.add_annotator(name, group or None)
            link = f"{base}/#{token}"
        links.append({"name": name, "group": group or None, "admin": False, "link": link})
    # The administrator's link is new at each start; who is signed in by an older one stays so.
    _, token = store.add_annotator("admin", admin=True, end_sessions=renew)
    links.append({"name": "admin", "group": None, "admin": True, "link": f"{base}/admin#{token}"})
    return links


def _add(
    terminal: Terminal,
    store: Store,
    path: Path,
    candidates: Sequence[Candidates],
    selection: str,
    policies: Sequence[Path],
    count: int | None,
) -> Imported:
    """Add all pairs of the candidates, or those that a selection takes first."""
    if selection == "random" and count is None:
        return store.add(candidates)
    with working(terminal) if policies else nullcontext(Silent()) as progress:
        return add_most_useful(
            store, path, candidates, selection, policies, count, progress=progress
        )


def tell_of_links(
    terminal: Terminal, path: Path, store: Store, links: list[dict[str, JSON]], *, encrypted: bool
) -> None:
    """Say who else can sign in, and warn where links and answers can be read on their way."""
    if not encrypted:
        terminal.say(
            "warning: links and answers go over the network unencrypted; put a server with "
            "https in front, and give its --url."
        )
    named = {one["name"] for one in links}
    others = [name for name in store.names_with_links() if name not in named]
    if others and len(named) > 1:
        terminal.say(
            f"{', '.join(others)} can still sign in; `dpo-keras feedback remove {path} NAME` ends "
            "that."
        )


def announcement(terminal: Terminal, base: str, links: list[dict[str, JSON]]) -> Callable[[], None]:
    """Return what prints the links, once the page can be opened."""
    width = max(len(one["name"]) for one in links)
    known = "has a link; --renew makes a new one"
    views = [f"{one['name'].ljust(width)}  {one['link'] or known}" for one in links]

    def announce() -> None:
        terminal.result({"url": base, "links": links}, *views)
        if not terminal.as_json:
            terminal.say("Ctrl-C ends the server; answers are kept as they come.")
        # Programs read the links before the server ends.
        sys.stdout.flush()

    return announce


def base_url(url: str | None, host: str, listening: socket) -> str:
    """Return the address of the page, without a slash at its end."""
    shown = f"[{host}]" if ":" in host else host
    return (url or f"http://{shown}:{listening.getsockname()[1]}").rstrip("/")
