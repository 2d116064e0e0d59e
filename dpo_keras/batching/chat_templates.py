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

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.text import did_you_mean

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
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            rule = f"{self.name!r} is not valid Jinja, line {line}: {error}"
            raise InputError(InputProblem("template", rule)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        **variables: JSON,
    ) -> str:
        """Render a conversation.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with what announces the assistant's turn.
            **variables: defaults for the template's variables. The template's own take precedence.

        Returns:
            The text.

        Raises:
            InputError: the template refuses the messages, or reaches outside the sandbox.
        """
        values = {"bos_token": "", "eos_token": "", **variables, **self.variables}
        try:
            return _compile(self.source).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **values,
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
            rule = f"{self.name!r} cannot render these messages: {error}"
            raise InputError(InputProblem("template", rule)) from error


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
        return _from_source(path.read_text(encoding="utf-8"), path.name, {})
    rule = f"{name!r} is neither a file nor a known name"
    if suggestion := did_you_mean(name, MARKERS):
        rule += f"; {suggestion}"
    hint = f"Known names: {', '.join(available_templates())}."
    raise InputError(InputProblem("template", rule, hint=hint))


def _from_checkpoint(folder: Path, config_name: str = "tokenizer_config.json") -> ChatTemplate:
    config_path = folder / config_name
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    source = config.get("chat_template")
    if (jinja_path := folder / "chat_template.jinja").is_file():
        source = jinja_path.read_text(encoding="utf-8")
    if isinstance(source, list):
        by_name = {entry["name"]: entry["template"] for entry in source}
        if "default" not in by_name:
            rule = (
                f"{str(config_path)!r} has chat templates named {', '.join(sorted(by_name))} and "
                "none named 'default'"
            )
            hint = "Save the one you want to a Jinja file and pass its path."
            raise InputError(InputProblem("template", rule, hint=hint))
        source = by_name["default"]
    if not isinstance(source, str):
        rule = (
            f"{str(folder)!r} has no chat template (neither chat_template.jinja nor a "
            f"chat_template entry in {config_name})"
        )
        hint = f"Pass a name ({', '.join(MARKERS)}) or the path of a Jinja file."
        raise InputError(InputProblem("template", rule, hint=hint))
    special = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    added = [
        entry["content"]
        for entry in config.get("added_tokens_decoder", {}).values()
        if entry.get("special")
    ]
    return _from_source(source, folder.name, special, [*special.values(), *added])


def _from_source(
    source: str, name: str, variables: Mapping[str, str], markers: Sequence[str] = ()
) -> ChatTemplate:
    found = dict.fromkeys([*markers, *_TOKEN_LIKE.findall(source)])
    return ChatTemplate(source, name, tuple(marker for marker in found if marker), variables)


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
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
