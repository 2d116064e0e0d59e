"""The guide lists every key of a configuration as the code has it.

`python tests/app/test_app_readme.py` writes the table anew.
"""

from pathlib import Path

from typer.main import get_command

from dpo_keras.app import console
from dpo_keras.app.cli import app
from dpo_keras.app.config import Config

README = Path(__file__).parents[2] / "dpo_keras" / "app" / "README.md"
HEAD = "| key | default | values | meaning |\n|---|---|---|---|\n"
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
ANY_COUNT = 2**31  # the guide says once that whole numbers are below it
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}


def keys(schema, definitions, section=""):
    """Yield (key, default, values, meaning) of every key that is no section."""
    for name, field in schema["properties"].items():
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        (kind,) = kinds
        if "$ref" in kind or "$ref" in kind.get("allOf", [{}])[0]:
            inner = definitions[(kind.get("$ref") or kind["allOf"][0]["$ref"]).split("/")[-1]]
            if field.get("default") is None:  # an optional section
                yield f"{section}{name}", "null", "section", field["description"]
            yield from keys(inner, definitions, f"{section}{name}.")
        else:
            default, meaning = field.get("default"), field.get("description", "")
            yield f"{section}{name}", shown(default), values(kind), meaning


def shown(value):
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == []:
        return "[]"
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"[{', '.join(value)}]"
    return str(value)


def values(kind):
    if "enum" in kind:
        return ", ".join(shown(one) for one in kind["enum"])
    if kind["type"] == "array":
        items = kind["items"]
        words = (
            ", ".join(items["enum"]) + ": " if "enum" in items and not kind.get("minItems") else ""
        )
        return "list of numbers" if items["type"] == "number" else f"{words}list, or one of it"
    if kind["type"] == "object":
        return "mapping"
    bounds = {rule: kind[rule] for rule in SIGNS if kind.get(rule, ANY_COUNT) != ANY_COUNT}
    limits = [f"{SIGNS[rule]} {round(bound)}" for rule, bound in bounds.items()]
    return " ".join([KINDS[kind["type"]], ", ".join(limits)]).strip()


def table():
    schema = Config.model_json_schema()
    rows = keys(schema, schema["$defs"])
    return HEAD + "".join(f"| `{key}` | {d} | {v} | {m} |\n" for key, d, v, m in rows)


def test_the_table_of_keys_is_that_of_the_code():
    assert table() in README.read_text(encoding="utf-8"), "python tests/app/test_app_readme.py"


def test_every_command_and_exit_code_is_in_the_guide():
    text = README.read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        for inner in getattr(command, "commands", {"": None}):
            assert f"`dpo-keras {f'{name} {inner}'.strip()}" in text
    for code in (console.DONE, console.FAILED, console.WRONG_INPUT, console.STOPPED):
        assert f"| {code} |" in text


if __name__ == "__main__":
    before, rest = README.read_text(encoding="utf-8").split(HEAD)
    after = rest[rest.index("\n\n") + 1 :]
    README.write_text(before + table() + after, encoding="utf-8")
