"""Chat templates known by name: Jinja sources, and the special tokens that mark their turns.

A beginning-of-text token is left to the tokenizer (`TextEncoder` adds it where the model's
preprocessor does). Roles are user, assistant and system; a template without a place for the system
message puts it before the first user turn's words.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dpo_keras.errors import InputError


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
    r"""Renders messages as text, in Jinja's sandbox, the way Hugging Face tokenizers do.

    Args:
        source: the Jinja template; it sees `messages`, `add_generation_prompt`, `bos_token`,
            `eos_token`, `raise_exception` and `strftime_now`.
        name: how messages refer to it.
        markers: the special tokens it writes. Each is looked up in the tokenizer as one token, and
            the same text inside a message cannot stand for it (see `encode_conversations`).
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
        """Compiles the source, so that a mistake shows at once."""
        try:
            _compile(self.source)
        except jinja2.TemplateError as error:
            raise InputError(
                f"template {self.name!r} is not valid Jinja, line "
                f"{getattr(error, 'lineno', '?')}: {error}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        r"""Renders a conversation.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with what announces the assistant's turn.
            **variables: defaults for the template's variables; the template's own win.

        Returns:
            The text.

        Raises:
            InputError: the template refused the messages, or reached outside the sandbox.

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
            raise InputError(f"template {self.name!r} cannot render these messages: {error}") from (
                error
            )


def available_templates() -> list[str]:
    """The template names that `template=` takes.

    Example:
        >>> "chatml" in available_templates()
        True
    """
    return sorted(NAMED)


def get_template(template: str | Path | ChatTemplate | None) -> ChatTemplate | None:
    """Finds a chat template.

    Args:
        template: a name from `available_templates()`; the path of a Jinja file; the path of a
            Hugging Face checkpoint directory or of its `tokenizer_config.json` (a
            `chat_template.jinja` file comes first, then the `chat_template` entry, of several the
            one named "default"); a `ChatTemplate`; or None.

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
    near = difflib.get_close_matches(str(template), NAMED, n=1)
    raise InputError(
        f"template {str(template)!r} is neither a file nor a known name"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" Known names: {', '.join(available_templates())}."
    )


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
            raise InputError(
                f"template: {config_path} has chat templates named {', '.join(sorted(by_name))} "
                "and none named 'default'. Save the one you want to a Jinja file and pass its path."
            )
        source = by_name["default"]
    if not isinstance(source, str):
        raise InputError(
            f"template: {folder} has no chat template (neither chat_template.jinja nor a "
            f"chat_template entry in {config_name}). Pass a name ({', '.join(NAMED)}) or the path "
            "of a Jinja file."
        )
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
    """`{% generation %}…{% endgeneration %}`, Hugging Face's mark around the assistant's words."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
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
