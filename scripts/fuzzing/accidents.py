"""What happens to files: bits flip, parts are lost, repeated or zeroed, other words come in."""

from __future__ import annotations

import random

WORDS = (
    *(b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r\n", b"\r", b"\x1c"),
    *(b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b";", b"#", b"- ", b": ", b"\t"),
    *(b"&a ", b"*a", b"\xe2\x80\xa8", b"\\ud800", b"\\u0000", b"1e308", b"-1e309", b"NaN"),
    *(b"Infinity", b"9" * 400, b"true", b"null", b"[" * 3000, b'{"a":' * 3000, b"<<: "),
    *(b"!!python/object:os.system ", b"../../etc/passwd", b"<script>", b"=cmd()", b"{{ 1/0 }}"),
    *(b"prompt", b"chosen", b'"weight": 0, ', b"swapped"),
)  # fmt: skip


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return other bytes: one to three small accidents, of those that files and lines suffer."""
    mutated = content
    while mutated == content:
        for _ in range(chance.choice((1, 1, 2, 3))):
            mutated = _one_accident(mutated, chance)
    return mutated


def _one_accident(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice((1, 1, 4, 32, 4096)))
    before, span, after = content[:start], content[start:end], content[end:]
    other = chance.randrange(len(content) + 1)
    accidents = (
        lambda: (
            before
            + bytes(byte ^ (1 << chance.randrange(8)) for byte in span[:1])
            + content[start + 1 :]
        ),
        lambda: before + chance.randbytes(len(span)) + after,
        lambda: before + bytes(len(span)) + after,
        lambda: before + after,
        lambda: before,
        lambda: before + span + span + after,
        lambda: before + chance.choice(WORDS) + content[start:],
        lambda: before + chance.choice(WORDS) + after,
        lambda: content[:other] + span + content[other:],
        lambda: _lines_swapped(content, chance),
    )
    return chance.choice(accidents)()


def _lines_swapped(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    chance.shuffle(lines)
    return b"\n".join(lines)
