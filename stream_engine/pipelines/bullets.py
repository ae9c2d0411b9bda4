"""The answers of text models: a list of sentences, one a line, read strictly.

    reply     = { blank | heading | bullet }
    heading   = "###" text
    bullet    = ("-" | "*" | "•") space text  the text is not empty

Anything else makes the whole reply unreadable: a sentence without its bullet may be the rest of the
one above, and a fact taken wrong is worse than an answer left out. A sign without its space may be
the first of a rule or of a bold title.
"""

from __future__ import annotations

BULLETS = ("-", "*", "•")
HEADING = "###"


def parse_bullets(text: str) -> list[str] | None:
    """The sentences in order, without their bullets; None when the text is not such a list."""
    sentences = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith(HEADING):
            continue
        bullet, sentence = line[:1], line[1:]
        if bullet not in BULLETS or not sentence[:1].isspace():
            return None
        sentences.append(sentence.strip())
    return sentences


def without_last_line(text: str) -> str:
    """What is whole of a list that was cut at the length limit."""
    return text.rpartition("\n")[0]
