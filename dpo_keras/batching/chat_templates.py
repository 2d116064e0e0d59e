"""Chat templates: Jinja sources that render messages as text, known by name or read from files.

The templates known by name are in `templates/`. They write no beginning-of-text token:
`TextEncoder` adds it where the model's preprocessor does. Their roles are user, assistant and
system. One without a place for the system message puts it before the words of the next user turn.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.text import did_you_mean, shortened

FOLDER = Path(__file__).with_name("templates")
# The templates known by name, with the texts in them that are one token each.
MARKERS: dict[str, tuple[str, ...]] = {
    "plain": (),  # strings stay as they are; messages are joined by line feeds
    "human_assistant": (),  # Anthropic's HH-RLHF files
    "chatml": ("<|im_start|>", "<|im_end|>"),  # Qwen, SmolLM, Yi and many others
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),  # Mistral instruct from 0.2 on
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
# What special tokens look like inside a template's source.
_TOKEN_LIKE = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z_]+>|<[a-z]+\||<\|[a-z]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class ChatTemplate:
    r"""Render messages as text in Jinja's sandbox, as Hugging Face tokenizers do.

    Args:
        source: the Jinja template. It sees `messages`, `add_generation_prompt`, `bos_token`,
            `eos_token`, `raise_exception` and `strftime_now`.
        name: the template's name in messages.
        markers: the special tokens that it writes. Each is looked up in the tokenizer as one token,
            and the same text inside a message cannot stand for it.
        variables: further values for the template, such as `bos_token`.

    Raises:
        InputError: the source is not valid Jinja.

    Example:
        >>> template = get_template("chatml")
        >>> template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    """

    source: str
    name: str = "template"
    markers: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compile the source, so that a mistake shows at once."""
        try:
            _compile(self.source)
        except _ANY_FAULT as error:
            line = getattr(error, "lineno", "?")
            rule = f"{self.name!r} is not valid Jinja, line {line}: {_reason(error)}"
            raise InputError(InputProblem("template", rule)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, JSON]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[JSON] = (),
        **variables: JSON,
    ) -> str:
        """Render a conversation.

        Args:
            messages: mappings with `role` and `content`; `tool_calls` and the like, too.
            add_generation_prompt: end with what announces the assistant's turn.
            tools: JSON schemas of the tools that the conversation offers.
            **variables: defaults for the template's variables. The template's own take precedence.

        Returns:
            The text.

        Raises:
            InputError: the template writes no tools or no calls, and the conversation has them; it
                refuses the messages, reaches outside the sandbox, calculates
                what cannot be, or does not come to an end.
        """
        self._check_tools(messages, tools)
        values = {"bos_token": "", "eos_token": "", **variables, **self.variables}
        try:
            return _compile(self.source).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                **{**values, _STEP: _Steps()},
            )
        except _ANY_FAULT as error:
            rule = f"{self.name!r} cannot render these messages: {_reason(error)}"
            raise InputError(InputProblem("template", rule)) from error

    def _check_tools(self, messages: Sequence[Mapping[str, JSON]], tools: Sequence[JSON]) -> None:
        """Refuse what the template would leave out without a word."""
        called = any(message.get("tool_calls") for message in messages)
        for name, present in (("tools", bool(tools)), ("tool_calls", called)):
            if present and not re.search(rf"\b{name}\b", self.source):
                rule = f"{self.name!r} does not write {name}, which this conversation has"
                hint = "Use the template of the model's own checkpoint: its directory."
                raise InputError(InputProblem("template", rule, hint=hint))


def available_templates() -> list[str]:
    """Return the template names that `get_template` knows.

    Example:
        >>> "chatml" in available_templates()
        True
    """
    return sorted(MARKERS)


def get_template(template: str | Path | ChatTemplate | None) -> ChatTemplate | None:
    """Find a chat template.

    Args:
        template: a name from `available_templates()`; the path of a Jinja file; the path of a
            Hugging Face checkpoint directory or of its `tokenizer_config.json` (the file
            `chat_template.jinja` takes precedence over the entry `chat_template`; of several
            templates the one named "default" is taken); a `ChatTemplate`; or None.

    Returns:
        The template, or None for None.

    Raises:
        InputError: no such name or file, a checkpoint without a template, or invalid Jinja.

    Example:
        >>> get_template("chatlm")
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: template 'chatlm' is neither a file nor a known name; did ...
    """
    if template is None or isinstance(template, ChatTemplate):
        return template
    name = str(template)
    if name in MARKERS:
        source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        return ChatTemplate(source.removesuffix("\n"), name, MARKERS[name])
    path = Path(template)
    if path.is_dir():
        return _from_checkpoint(path)
    if path.is_file():
        if path.suffix == ".json":
            return _from_checkpoint(path.parent, path.name)
        return _from_source(_read_text(path), path.name, {})
    rule = f"{name!r} is neither a file nor a known name"
    if suggestion := did_you_mean(name, MARKERS):
        rule += f"; {suggestion}"
    hint = f"Known names: {', '.join(available_templates())}."
    raise InputError(InputProblem("template", rule, hint=hint))


def _from_checkpoint(folder: Path, config_name: str = "tokenizer_config.json") -> ChatTemplate:
    config_path = folder / config_name
    config = _read_config(config_path) if config_path.is_file() else {}
    source = config.get("chat_template")
    if (jinja_path := folder / "chat_template.jinja").is_file():
        source = _read_text(jinja_path)
    if isinstance(source, list):
        source = _default_of_several(source, config_path)
    if source is not None and not isinstance(source, str):
        raise _wrong_config(config_path, "chat_template", "a text, or a list of templates", source)
    if source is None:
        rule = (
            f"{str(folder)!r} has no chat template (neither chat_template.jinja nor a "
            f"chat_template entry in {config_name})"
        )
        hint = f"Pass a name ({', '.join(MARKERS)}) or the path of a Jinja file."
        raise InputError(InputProblem("template", rule, hint=hint))
    special = {
        key: _content(value, key, config_path)
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise _wrong_config(config_path, "added_tokens_decoder", "an object", decoder)
    added = [
        _content(entry, f"added_tokens_decoder.{key}", config_path)
        for key, entry in decoder.items()
        if not isinstance(entry, dict) or entry.get("special")
    ]
    return _from_source(source, folder.name, special, [*special.values(), *added])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"{str(path)!r} cannot be read as text in UTF-8: {error}"
        raise InputError(InputProblem("template", rule)) from error


def _read_config(path: Path) -> dict[str, JSON]:
    try:
        config = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(InputProblem("template", f"{str(path)!r} is not JSON: {error}")) from error
    if not isinstance(config, dict):
        rule = f"{str(path)!r} must hold a JSON object, got {shortened(repr(config))}"
        raise InputError(InputProblem("template", rule))
    return config


def _default_of_several(templates: list[JSON], path: Path) -> JSON:
    by_name: dict[str, JSON] = {}
    for number, entry in enumerate(templates):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            rule = "an object with name and template"
            raise _wrong_config(path, f"chat_template[{number}]", rule, entry)
        by_name[entry["name"]] = entry.get("template", "")
    if "default" in by_name:
        return by_name["default"]
    rule = (
        f"{str(path)!r} has chat templates named {', '.join(sorted(by_name))} and none named "
        "'default'"
    )
    hint = "Save the one you want to a Jinja file and pass its path."
    raise InputError(InputProblem("template", rule, hint=hint))


def _content(entry: JSON, key: str, path: Path) -> str:
    """Return the text of a token: it stands there, or in `content`."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str):
        raise _wrong_config(path, key, "a text, or an object with a text in content", entry)
    return content


def _wrong_config(path: Path, key: str, rule: str, value: JSON) -> InputError:
    rule = f"{str(path)!r} is malformed: {key} must be {rule}, got {shortened(repr(value))}"
    return InputError(InputProblem("template", rule))


def _from_source(
    source: str, name: str, variables: Mapping[str, str], markers: Sequence[str] = ()
) -> ChatTemplate:
    found = dict.fromkeys([*markers, *_TOKEN_LIKE.findall(source)])
    return ChatTemplate(source, name, tuple(marker for marker in found if marker), variables)


# What a template's code can raise, beside what Jinja does.
_ANY_FAULT = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError, SyntaxError),
)
_STEP = "__dpo_keras_step"
MOST_STEPS = 200_000  # rounds of loops and calls of macros, in one rendering
MOST_REPEATED = 1_000_000  # letters or items of a repeated text or list


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    return str(error) or type(error).__name__


class _Steps:
    """Counts the steps of one rendering, and ends one that would not end."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise jinja2.TemplateError(f"it takes more than {MOST_STEPS:,} steps")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that refuses products which would fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculate `left * right` or `left ** right`."""
        if operator == "**":
            refused = abs(left) > MOST_REPEATED or abs(right) > 64
        else:
            count = right if hasattr(left, "__len__") else left
            repeated = left if hasattr(left, "__len__") else right
            refused = hasattr(repeated, "__len__") and len(repeated) * count > MOST_REPEATED
        if refused:
            raise jinja2.TemplateError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's words in Hugging Face files."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    tree = environment.parse(source)
    bodies: list[jinja2.nodes.For | jinja2.nodes.Macro]
    bodies = [*tree.find_all(jinja2.nodes.For), *tree.find_all(jinja2.nodes.Macro)]
    for node in bodies:
        name = jinja2.nodes.Name(_STEP, "load", lineno=node.lineno)
        call = jinja2.nodes.Call(name, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
    return environment.from_string(tree)
