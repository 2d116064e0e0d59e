"""The objectives, penalties and options as tables: for the page of documentation and for `--help`.

python scripts/losses_page.py            # print the tables
python scripts/losses_page.py --write    # put them into dpo_keras/losses/README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dpo_keras.losses import penalties
from dpo_keras.losses.options import OBJECTIVES, OPTIONS, takers_of, users_of
from dpo_keras.losses.penalties import PENALTIES

PAGE = Path(__file__).parents[1] / "dpo_keras/losses/README.md"
BEGIN = "<!-- tables: made by `python scripts/losses_page.py --write` -->"
END = "<!-- end of tables -->"

# Every objective takes these, or nearly: naming them in each row would hide the others.
COMMON = {"beta", "group_robust", "margin", "wpo", "wpo_max_weight"}


def objective_rows() -> list[dict[str, str]]:
    """List the objectives, one row each.

    Returns:
        Rows with `name`, `loss`, `what it does`, `reference`, `own options`, `arXiv`.

    Example:
        >>> objective_rows()[1]["name"], objective_rows()[1]["loss"]
        ('hinge', 'max(0, 1 - βΔ)')
    """
    return [
        {
            "name": name,
            "loss": objective.formula,
            "what it does": objective.summary(),
            "reference": "yes" if objective.needs_reference() else "no",
            "own options": ", ".join(sorted(objective.option_names() - COMMON)) or "-",
            "arXiv": objective.source,
        }
        for name, objective in OBJECTIVES.items()
    ]


def penalty_rows() -> list[dict[str, str]]:
    """List the penalties, one row each.

    Example:
        >>> penalty_rows()[0]["name"]
        'insufficient_confidence'
    """
    return [
        {
            "name": name,
            "what it does": (getattr(penalties, name).__doc__ or "").split("\n")[0],
            "goes with": _listed(takers_of(name)),
        }
        for name in PENALTIES
    ]


def option_rows() -> list[dict[str, str]]:
    """List the options, one row each.

    Example:
        >>> [row["goes with"] for row in option_rows() if row["name"] == "gamma"]
        ['simpo, alphapo']
    """
    return [
        {
            "name": name,
            "what it does": option.summary,
            "value": option.rule,
            "goes with": _listed(users_of(name)),
        }
        for name, option in OPTIONS.items()
    ]


def _listed(names: list[str]) -> str:
    return "every loss" if len(names) == len(OBJECTIVES) else ", ".join(names)


def markdown(rows: list[dict[str, str]]) -> str:
    """Write rows as a Markdown table, the first column in code style.

    Example:
        >>> print(markdown([{"name": "a", "loss": "|x|"}]))
        | name | loss |
        |---|---|
        | `a` | ¦x¦ |
    """
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        # A bar would end the cell, even escaped in some renderers.
        cells = [row[column].replace("|", "¦") for column in head]
        lines.append("| " + " | ".join([f"`{cells[0]}`", *cells[1:]]) + " |")
    return "\n".join(lines)


def tables() -> str:
    """Write the three tables with their headings."""
    return "\n\n".join(
        [
            "### Preference losses (`loss_type`)",
            markdown(objective_rows()),
            "### Penalties (`penalties={name: weight}`)",
            markdown(penalty_rows()),
            "### Options",
            markdown(option_rows()),
        ]
    )


def page(text: str) -> str:
    """Put the tables of today into the text of the page.

    Args:
        text: the page, with the two marker lines.

    Returns:
        The page with all between the markers made anew.
    """
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Tables of objectives, penalties and options.")
    parser.add_argument("--write", action="store_true", help="update README.md beside this file")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
