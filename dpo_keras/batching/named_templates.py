"""Chat templates known by name: Jinja sources, and the special tokens that mark their turns.

A beginning-of-text token is left to the tokenizer (`TextEncoder` adds it where the model's
preprocessor does). Roles are user, assistant and system; a template without a place for the system
message puts it before the first user turn's words.
"""

from __future__ import annotations

from typing import NamedTuple


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
