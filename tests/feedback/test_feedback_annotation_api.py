"""What the page gets: Markdown as harmless elements, conversations, one whole document."""

import pytest
from feedback_http import Person

from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.annotation_api import page, render


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("**Hi** <script>", (["p", {}, [["strong", {}, ["Hi"]], " <script>"]],)),
        ("[here](javascript:alert(1))", (["p", {}, ["[here](javascript:alert(1))"]],)),
        ("[here](ftp://a)", (["p", {}, ["here"]],)),
        ("[](ftp://a)", (["p", {}, []],)),
        ("[here](http://a)", (["p", {}, [["a", {"href": "http://a"}, ["here"]]]],)),
        ("- one", (["ul", {}, [["li", {}, ["one"]]]],)),
        ("3. three", (["ol", {"start": "3"}, [["li", {}, ["three"]]]],)),
        ("# One\ntwo", (["h4", {}, ["One"]], ["p", {}, ["two"]])),
        ("a\nb", (["p", {}, ["a", ["br", {}, []], "b"]],)),
        ("```py\nx\n```", (["pre", {}, [["code", {}, ["x\n"]]]],)),
        ("`x`", (["p", {}, [["code", {}, ["x"]]]],)),
    ],
)
def test_markdown_becomes_known_elements(text, nodes):
    assert render(text) == nodes


HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[x](javascript:alert(1)) ![y](http://127.0.0.1/z.png)",
    "\u202eevil\u202c مرحبا بالعالم 👩‍👩‍👧‍👦 \x00",
    "</style></script><!--",
    "> " * 500 + "deep",
    "*" * 2000,
    "[" * 2000,
    "```\nnever closed <b>",
    "&lt;b&gt; &amp; &#x3c;script&#x3e;",
]


def texts(node):
    return node if isinstance(node, str) else "".join(texts(child) for child in node[2])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_responses_stay_text(make_store, text):
    store = make_store(given=[Candidates(text, (Response(text + " 1"), Response(text + " 2")))])
    one = Person(store, "ann").next()["presentations"][0]

    def check(node):
        if isinstance(node, str):
            return
        tag, attributes, children = node
        assert tag not in ("script", "img", "style", "iframe", "html")
        assert set(attributes) <= {"href", "start", "class"}
        assert attributes.get("href", "http://").startswith(("http://", "https://"))
        for child in children:
            check(child)

    for part in (one["left"], one["right"], one["prompt"][0]["body"]):
        for node in part:
            check(node)
    shown = "".join(texts(node) for node in one["left"])
    for word in ("<script>alert(1)</script>", "onerror", "evil", "deep", "never closed <b>"):
        assert (word in text) == (word in shown)


def test_responses_of_a_megabyte_are_shown_whole(make_store):
    long = "word " * 200_000
    store = make_store(given=[Candidates("p", (Response(long + "a"), Response(long + "b")))])
    one = Person(store, "ann").next()["presentations"][0]
    assert {texts(one["left"][0]), texts(one["right"][0])} == {long + "a", long + "b"}


def test_conversations_are_shown_turn_by_turn(make_store, tmp_path):
    from dpo_keras.preferences import Message

    prompt = (Message("system", "Be short."), Message("user", "Hi"))
    store = make_store(given=[Candidates(prompt, (Response("a"), Response("b")))])
    turns = Person(store, "ann").next()["presentations"][0]["prompt"]
    assert [turn["role"] for turn in turns] == ["Instructions", "Person"]


@pytest.mark.parametrize("name", ["annotate", "admin"])
def test_the_page_is_small_whole_and_names_nothing_elsewhere(name):
    body = page(name).body
    assert len(body) < 100_000
    text = body.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "/*style*/" not in text and "/*script*/" not in text
    assert "src=" not in text and "url(" not in text and "@import" not in text
    assert "https://" not in text and "http://" not in text
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in text
