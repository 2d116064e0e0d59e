"""Chat templates: Jinja sources that render messages as text, known by name or read from files.

The templates known by name write no beginning-of-text token: `TextEncoder` adds it where the
model's preprocessor does. Their roles are user, assistant and system. A template without a place
for the system message puts it before the words of the next user turn.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.tensors import JSON
from dpo_keras.utils.text import did_you_mean


class NamedTemplate(NamedTuple):
    """A Jinja source and the texts in it that stand for one token each."""

    source: str
    markers: tuple[str, ...] = ()


_WITH_SYSTEM_IN_USER = """
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = SYSTEM -%}
{%- elif message.role == 'assistant' -%}
ASSISTANT
{%- else -%}
USER
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
"""


def _turns(user: str, assistant: str, system: str = r"message.content + '\n\n'") -> str:
    source = _WITH_SYSTEM_IN_USER.replace("SYSTEM", system)
    source = source.replace("ASSISTANT", "{{- " + assistant + " -}}")
    return source.replace("USER", "{{- " + user + " -}}").strip()


NAMED: dict[str, NamedTemplate] = {
    # Strings stay as they are; messages are joined by line feeds.
    "plain": NamedTemplate(
        "{% for message in messages %}{{ message.content }}"
        r"{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    # Anthropic's HH-RLHF files.
    "human_assistant": NamedTemplate(
        _turns(
            r"'\n\nHuman: ' + ns.system + message.content", r"'\n\nAssistant: ' + message.content"
        )
        + r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
    # Qwen, SmolLM, Yi and many others.
    "chatml": NamedTemplate(
        r"{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
        r"+ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama2": NamedTemplate(
        _turns(
            "(bos_token if not loop.first and ns.system == '' else '') + '[INST] ' + ns.system "
            "+ message.content + ' [/INST]'",
            "' ' + message.content + ' ' + eos_token",
            r"'<<SYS>>\n' + message.content + '\n<</SYS>>\n\n'",
        ),
        ("<s>", "</s>"),
    ),
    "llama3": NamedTemplate(
        r"{% for message in messages %}{{ '<|start_header_id|>' + message.role "
        r"+ '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Mistral instruct from 0.2 on.
    "mistral": NamedTemplate(
        _turns(
            "'[INST] ' + ns.system + message.content + ' [/INST]'",
            "' ' + message.content + eos_token",
        ),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "gemma": NamedTemplate(
        _turns(
            r"'<start_of_turn>user\n' + ns.system + message.content | trim + '<end_of_turn>\n'",
            r"'<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n'",
        )
        + r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": NamedTemplate(
        r"{% for message in messages %}"
        r"{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
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
        r"""Render a conversation.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with what announces the assistant's turn.
            **variables: defaults for the template's variables. The template's own take precedence.

        Returns:
            The text.

        Raises:
            InputError: the template refuses the messages, or reaches outside the sandbox.

        Example:
            >>> get_template("gemma").render([{"role": "assistant", "content": "Hello!"}])
            '<start_of_turn>model\nHello!<end_of_turn>\n'
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
    return sorted(NAMED)


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
    if str(template) in NAMED:
        named = NAMED[str(template)]
        return ChatTemplate(named.source, str(template), named.markers)
    path = Path(template)
    if path.is_dir():
        return _from_checkpoint(path)
    if path.is_file():
        if path.suffix == ".json":
            return _from_checkpoint(path.parent, path.name)
        return _from_source(path.read_text(encoding="utf-8"), path.name, {})
    rule = f"{str(template)!r} is neither a file nor a known name"
    if suggestion := did_you_mean(str(template), NAMED):
        rule += f"; {suggestion}"
    hint = f"Known names: {', '.join(available_templates())}."
    raise InputError(InputProblem("template", rule, hint=hint))


def _from_checkpoint(folder: Path, config_name: str = "tokenizer_config.json") -> ChatTemplate:
    config_path = folder / config_name
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    source = config.get("chat_template")
    jinja_path = folder / "chat_template.jinja"
    if jinja_path.is_file():
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
        hint = f"Pass a name ({', '.join(NAMED)}) or the path of a Jinja file."
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


def _tojson(value: JSON, **options: JSON) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
