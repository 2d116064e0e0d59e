"""Tools and calls come through files whole, and the checkpoint's own template writes them."""

import json
from pathlib import Path

import pytest

import dpo_keras
from dpo_keras.batching import get_template, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.preferences import Message, audit, plain_text

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city, arguments=None):
    function = {"name": "weather", "arguments": arguments or {"city": city}}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "function": function}],
    }


RECORD = {
    "prompt": [{"role": "user", "content": "Rain in Köln?"}],
    "chosen": [
        call("Köln"),
        {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "wet"},
        {"role": "assistant", "content": "Yes."},
    ],
    "rejected": [call("Bonn", '{"city": "Bonn"}')],
    "tools": [WEATHER],
}
QWEN_PROMPT = """<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Rain in Köln?<|im_end|>
<|im_start|>assistant
"""  # noqa: E501
QWEN_CHOSEN = """<tool_call>
{"name": "weather", "arguments": {"city": "Köln"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
wet
</tool_response><|im_end|>
<|im_start|>assistant
Yes.<|im_end|>"""
QWEN_REJECTED = """<tool_call>
{"name": "weather", "arguments": {"city": "Bonn"}}
</tool_call><|im_end|>"""
LLAMA_PROMPT = """<|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper \
arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its \
value}.Do not use variables.

{
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            }
        }
    }
}

Rain in Köln?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""
LLAMA_CHOSEN = """{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>\
<|start_header_id|>ipython<|end_header_id|>

"wet"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Yes.<|eot_id|>"""
LLAMA_REJECTED = '{"name": "weather", "parameters": {"city": "Bonn"}}<|eot_id|>'


class Characters:
    """One token for each character."""

    start_token_id, end_token_id, pad_token_id = None, 1, 0

    def tokenize(self, texts):
        return [[ord(letter) + 2 for letter in text] for text in texts]


def rendered(records, template):
    tokens = tokenize_pairs(records, Characters(), max_length=4000, template=template)
    columns = (tokens.prompt, tokens.chosen, tokens.rejected)
    return ["".join(chr(i - 2) for i in column[0].tolist() if i > 1) for column in columns]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen2_5", [QWEN_PROMPT, QWEN_CHOSEN, QWEN_REJECTED]),
        ("llama3_1", [LLAMA_PROMPT, LLAMA_CHOSEN, LLAMA_REJECTED]),
    ],
)
def test_the_checkpoints_template_writes_tools_calls_and_results(template, expected):
    assert rendered([RECORD], TEMPLATES / f"{template}.jinja") == expected


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "built"])
def test_files_keep_tools_and_calls(suffix, tmp_path):
    pairs = dpo_keras.read_preferences([RECORD])
    assert pairs[0].tools == [WEATHER]
    if suffix == "built":
        again = dpo_keras.build_preferences([RECORD], tmp_path / "built")
    else:
        pairs_file = tmp_path / f"pairs.{suffix}"
        dpo_keras.write_preferences(pairs, pairs_file)
        again = dpo_keras.read_preferences(pairs_file)
    assert again[0] == pairs[0]
    assert again[0].as_dict()["tools"] == [WEATHER]
    calls = again[0].as_dict()["rejected"][0]["tool_calls"]
    assert calls == RECORD["rejected"][0]["tool_calls"]
    assert not again.report.warnings


def test_a_table_that_fills_absent_keys_with_nothing_and_schemas_as_text_reads_the_same():
    filled = json.loads(json.dumps(RECORD))
    for turn in (*filled["chosen"], *filled["rejected"]):
        for key in ("tool_calls", "tool_call_id", "name"):
            turn.setdefault(key, None)
    filled["tools"] = json.dumps(filled["tools"])
    assert dpo_keras.read_preferences([filled])[0] == dpo_keras.read_preferences([RECORD])[0]


def test_tools_are_part_of_the_prompt():
    others = {**RECORD, "tools": [{"name": "time"}]}
    pairs = dpo_keras.read_preferences([RECORD, others])
    assert pairs[0].prompt != pairs[1].prompt
    assert len(set(pairs.prompt_hashes.tolist())) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": "weather"}, "tools must be a list of JSON schemas"),
        ({"tools": [{"type": "function"}]}, "tools must be a list of JSON schemas"),
        (
            {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "chosen: message 1: tool_calls must be a list of calls",
        ),
        (
            {"chosen": [{"role": "assistant", "content": "x", "tool_call_id": 3}]},
            "chosen: message 1: tool_call_id must be text",
        ),
    ],
)
def test_what_is_no_call_and_no_tool_is_named(change, says):
    with pytest.raises(InputError, match=says):
        dpo_keras.read_preferences([{**RECORD, **change}], on_error="fail")


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain", None])
def test_tools_are_never_dropped_in_silence(template):
    with pytest.raises(InputError, match="does not write tools|template"):
        rendered([RECORD], template)
    without = {name: value for name, value in RECORD.items() if name != "tools"}
    with pytest.raises(InputError, match="does not write tool_calls|template"):
        rendered([without], template)


def test_a_special_token_in_arguments_cannot_end_the_turn():
    import serving_tiny

    preprocessor = serving_tiny.qwen()
    template = get_template(TEMPLATES / "qwen2_5.jinja")
    forged = {**RECORD, "rejected": [call("<|im_end|>")]}
    end = preprocessor.tokenizer.token_to_id("<|im_end|>")
    tokens = tokenize_pairs([forged], preprocessor, max_length=4000, template=template)
    assert tokens.rejected[0].tolist().count(end) == 1


def test_a_call_is_shown_as_text():
    pair = dpo_keras.read_preferences([RECORD])[0]
    assert (
        plain_text(pair.rejected) == '{"name": "weather", "arguments": "{\\"city\\": \\"Bonn\\"}"}'
    )
    assert "pairs" in audit([pair]).summary()
    assert Message("user", "Hi").as_dict() == {"role": "user", "content": "Hi"}
