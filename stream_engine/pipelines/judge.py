"""What is counted while answers are judged: the names in `SampleRewards.judge`, and the rates.

A counter is summed over a run by the merger; `Pipeline.judge_rates` divides two of them for
stats.json and the dataset's card. No pipeline uses a name that is not described here.
"""

from __future__ import annotations

COUNTERS: dict[str, str] = {
    # divide_and_conquer
    "answers": "answers that were looked at",
    "answers_judged": "answers that got a score",
    "facts": "facts of the judged answers",
    "facts_denied": "facts of the judged answers that the auto-check model denied",
    "facts_checked": "yes/no questions asked; a question that several answers raise is asked once",
    "outside_mass": "sum over facts_checked of 1 - p(yes) - p(Yes) - p(no) - p(No)",
    "split_unparsed": "answers whose list of facts could not be read",
    "split_cut": "answers whose list of facts was cut at the length limit; the cut line is dropped",
    "no_facts": "answers whose list of facts is empty",
    "asked_again": "answers whose facts were turned into questions again, one by one",
    "question_count_mismatch": "answers whose facts did not become one question each even so",
    # llava_critic
    "comparisons": "verdicts asked for, each on an ordered pair of answers",
    "verdict_first": "verdicts for the answer that stands first",
    "verdict_second": "verdicts for the answer that stands second",
    "verdict_equal": "verdicts that the two are equal",
    "verdict_unparsed": "replies in which no verdict, or more than one, could be read",
    "not_asked": "comparisons that were too long for the critic",
    "matches": "pairs of different answers that were compared, in both orders",
    "won": "matches with a winner",
    "ties": "matches without one",
    "flips": "ties in which the better answer is the one in the same place, whichever stands there",
    "won_unequal_length": "matches won in which one answer had more words",
    "won_by_longer": "those of them that the answer with more words won",
    "identical": "answers that repeat another one's text; they share its score unasked",
}
