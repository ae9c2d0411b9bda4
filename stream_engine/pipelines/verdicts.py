"""What a critic's reply says: the first answer is better, the second is, they are equal, or none.

    verdict   = mark | sentence
    mark      = "[first]" | "[second]"
    sentence  = ["the"] ("first" | "second") "response is better"
              | ["the"] "two responses are equally" | ["the"] "two responses are identical"
              | "both responses are equally" | "both responses are identical"

Upper and lower case and runs of white space are alike; a verdict may stand anywhere in the reply.
A sentence whose clause denies or doubts it ("not", "neither", "if", "whether" ... before it) does
not count. Marks are the form that critics are trained to answer in: where there are any, sentences
are reasoning and do not count. A reply without a verdict, or with verdicts that contradict each
other, is unparsed.
"""

from __future__ import annotations

import re
from typing import Literal

Verdict = Literal["first", "second", "equal"]

VALUES: dict[Verdict | None, int] = {"first": 1, "second": -1, "equal": 0, None: 0}
"""What a verdict is worth to the answer that stands first."""

_VERDICT = re.compile(
    r"\[(?P<mark>first|second)\]"
    r"|\b(?P<better>first|second)\s+response\s+is\s+better\b"
    r"|\b(?P<equal>(two|both)\s+responses\s+are\s+(equally|identical))\b",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(not|never|neither|nor|if|whether|unless|cannot|\w+n['’]t)\b", re.IGNORECASE
)
_CLAUSE_ENDS = re.compile(r"[.,;:!?\n]|\b(?:but|then|however)\b", re.IGNORECASE)


def parse_verdict(reply: str) -> Verdict | None:
    """The one verdict of a reply, by its marks if it has any; None when it has none or several."""
    matches = list(_VERDICT.finditer(reply))
    marks = [match for match in matches if match["mark"]]
    found: set[Verdict] = set()
    for match in marks or matches:
        clause = _CLAUSE_ENDS.split(reply[: match.start()])[-1]
        if match["mark"] or not _DOUBT.search(clause):
            word = (match["mark"] or match["better"] or "equal").lower()
            found.add("first" if word == "first" else "second" if word == "second" else "equal")
    return found.pop() if len(found) == 1 else None


def parse_verdict_rlaifv(reply: str) -> Verdict | None:
    """RLAIF-V's rule: the first of these phrases that occurs anywhere, in this order."""
    if "[first]" in reply or "The first response is better" in reply:
        return "first"
    if "[second]" in reply or "The second response is better" in reply:
        return "second"
    phrases = (
        "Two responses are equally",
        "The two responses are equally good",
        "The two responses are identical",
        "Both responses are equally good",
    )
    return "equal" if any(phrase in reply for phrase in phrases) else None
