"""What the page gets: Markdown as harmless elements, conversations, one whole document."""

import random

import pytest
from feedback_http import Person
from feedback_rounds import candidates, judge_all

from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.annotation_api import page
from dpo_keras.feedback.markdown_rendering import render


def syntax(text):
    return ["span", {"class": "syntax"}, [text]]


def unseen(character):
    name = f"U+{ord(character):04X}"
    return ["span", {"class": "unseen-character", "source": character}, [name]]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("**Hi** <script>", (["p", {}, [["strong", {}, ["Hi"]], " <script>"]],)),
        ("[here](javascript:alert(1))", (["p", {}, ["[here](javascript:alert(1))"]],)),
        ("[here](ftp://a)", (["p", {}, ["here", syntax("(ftp://a)")]],)),
        ("[](ftp://a)", (["p", {}, [syntax("(ftp://a)")]],)),
        (
            "[here](http://a 'b')",
            (["p", {}, [["a", {"href": "http://a"}, ["here"]], syntax("(http://a 'b')")]],),
        ),
        ("- one", (["ul", {}, [["li", {}, ["one"]]]],)),
        (
            "3. three\n9. nine",
            (
                [
                    "ol",
                    {},
                    [["li", {"value": n}, [word]] for n, word in (("3", "three"), ("9", "nine"))],
                ],
            ),
        ),
        ("# One\ntwo", (["h4", {}, ["One"]], ["p", {}, ["two"]])),
        ("a\nb", (["p", {}, ["a", ["br", {}, []], "b"]],)),
        (
            "```py\nx\n```",
            (["div", {"class": "language"}, ["py"]], ["pre", {}, [["code", {}, ["x\n"]]]]),
        ),
        ("\\(x\\) &lt;", (["p", {}, [syntax("\\"), "(", "x", syntax("\\"), ")", " ", "&lt;"]],)),
        ("`x`", (["p", {}, [["code", {}, ["x"]]]],)),
    ],
)
def test_markdown_becomes_known_elements(text, nodes):
    assert render(text) == nodes


@pytest.mark.parametrize(
    "character",
    # Overrides, embeddings and isolates of direction, marks, zero widths, fillers, tags, selectors.
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u200b\u200c\u200d\u2060\ufeff"
    "\u00ad\u180e\u034f\u115f\u3164\uffa0\u2800\u2028\U000e0041\ufe00\ufe0f\U000e0101\x9b",
)
def test_characters_that_nobody_sees_are_named(character):
    marked = ("one", unseen(character), "two")
    text = f"one{character}two"
    assert render(text) == (["p", {}, [*marked]],)
    assert render(f"`{text}`") == (["p", {}, [["code", {}, [*marked]]]],)
    assert render(f"    {text}") == (["pre", {}, [["code", {}, [*marked[:2], "two\n"]]]],)
    assert render(text + " " * 30_000)[0][2][:3] == [*marked[:2], "two" + " " * 30_000]


def test_control_characters_are_shown_as_pictures():
    assert render("a\x00b\x1bc\x7f") == (["p", {}, ["a␀b␛c␡"]],)


@pytest.mark.parametrize(
    "text", ["👩\u200d👩\u200d👧", "می\u200cروم", "क्\u200dष", "❤\ufe0f\u200d🔥", "1\ufe0f\u20e3"]
)
def test_joiners_stay_where_an_emoji_or_a_script_needs_them(text):
    assert render(text) == (["p", {}, [text]],)


FRAGMENTS = r"""
[a1]: http://e.v/hidden 'title2';[b3][a1];[^4]: note;[c5]: <d6>;![e7](http://i.j/k8 "l");<!-- m9 -->
<b n1='o'>p2</b>;&#x202e,q3&#8238,&NotEqualTilde,;[](ftp://s5);# f7 #;- - e6;<http://xn--j2-a.k/%41>
[l3](http://ü.m/ö?n=`4` 'o`5');\p6\*q;*u1 **v2* w3**;``x4 ` y5``;~~z6~~;[d [e](f) g](h);r4|t5
"""
BLOCKS = [
    *("| t | u |\n|---|---|\n| v6 | w7 | x8 |", "```y9 z1\ncode\n```", "~~~a2\nb3", "7. c4\n1. d5"),
    *("g8\n===", "> h9\ni1", "\tr7", "\ts8\n\n    t9", "\u202er4\u202c", "a\u200bb", "_\u2028i_"),
    *(one.replace(",", ";") for line in FRAGMENTS.splitlines() for one in line.split(";")),
]


@pytest.mark.parametrize("seed", range(5))
def test_no_letter_that_a_model_wrote_is_left_out(seed):
    """Links, titles, definitions, comments, languages of code, cells too many, and mixtures."""
    chance = random.Random(seed)
    for _ in range(60):
        parts = chance.choices(BLOCKS, k=5)
        between = chance.choices(["\n\n", "\n", " ", "\n> ", "\n- "], k=5)
        text = "".join(part + gap for part, gap in zip(parts, between, strict=True))
        shown = "".join(texts(node) for node in render(text))
        assert list(filter(str.isalnum, shown)) == list(filter(str.isalnum, text)), text


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
    """The text of a node as it was written."""
    if isinstance(node, str):
        return node
    own = node[1].get("value", "")
    return node[1].get("source") or own + "".join(texts(child) for child in node[2])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_responses_stay_text(make_store, text):
    store = make_store(given=[Candidates(text, (Response(text + " 1"), Response(text + " 2")))])
    one = Person(store, "ann").next()["presentations"][0]

    def check(node):
        if isinstance(node, str):
            return
        tag, attributes, children = node
        assert tag not in ("script", "img", "style", "iframe", "html")
        assert set(attributes) <= {"href", "value", "class", "source"}
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


def test_bars_of_annotators_and_hours_add_up_to_the_progress(make_store):
    """Hidden checks and repeats are counted apart."""
    given = candidates(12) + [
        Candidates(f"check {n}", (Response("yes"), Response("no")), gold=0) for n in range(4)
    ]
    options = {"gold_share": 0.3, "repeat_share": 0.3, "repeat_distance": 1}
    store = make_store(given=given, overlap=1, **options)
    ann, _ = store.add_annotator("ann")
    judge_all(store, ann.id, lambda shown: "skip" if shown.left.endswith(" 3") else "left")
    seen = Person(store, "boss", admin=True).get("/api/admin").json()
    (row,) = seen["people"]
    assert row["checks"] and row["repeats"] and row["skipped"] == 1
    assert seen["judged"] == row["judged"] == sum(count for _, count in seen["hours"])


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
