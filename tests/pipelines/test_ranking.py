"""Ranking: the rules, their edge cases, and the ancestor's rules written down a second time."""

from __future__ import annotations

import itertools
import random

import pytest

from stream_engine.pipelines import ranking
from stream_engine.pipelines.ranking import (
    count_words,
    rank_by_denied_facts,
    rank_by_reward,
    rank_by_wins,
    similarity,
    words,
)
from stream_engine.records import Answer, AnswerScore, SampleRewards


def answer(index: int, text: str) -> Answer:
    return Answer(index=index, text=text, token_ids=[1], token_logps=[-1.0], finish_reason="length")


def scored(index: int, total: float, average: float | None = None) -> AnswerScore:
    average = total if average is None else average
    return AnswerScore(index=index, score=total, scores={"sum": total, "avg": average})


def distinct_answers(n: int) -> list[Answer]:
    """Answers of six words that share none."""
    return [answer(i, " ".join(f"w{i}x{j}" for j in range(6))) for i in range(n)]


def by_reward(answers: list[Answer], scores: list[AnswerScore], **options: object) -> list:
    settings = {"rank": 3, "distance": 25, **options}
    return rank_by_reward(answers, SampleRewards(key="k", scores=scores), **settings)


def indices(pairs: list) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_words_are_split_at_spaces_and_unspaced_scripts_by_character() -> None:
    assert words("a red  circle.\n") == ["a", "red", "circle."]
    assert words("红色的圆 circle") == ["红", "色", "的", "圆", "circle"]
    assert count_words("   ") == 0


def test_words_are_those_that_are_seen() -> None:
    """Answers apart in what has no width passed for two, and were the best and the worst."""
    seen = words("un caf\u00e9 noir")
    assert words("un\u200b cafe\u0301 \u2060 no\u00adir") == seen
    assert count_words("\u200b \ufeff") == 0
    answers = [answer(0, "un caf\u00e9"), answer(1, "un\u200b cafe\u0301"), answer(2, "deux chats")]
    assert indices(by_reward(answers, [scored(i, -i) for i in range(3)])) == [(0, 2)]


def test_strict_pairs_are_the_best_with_the_worst() -> None:
    pairs = by_reward(
        distinct_answers(10), [scored(i, -i) for i in range(10)], strict_follow_rank=True
    )
    assert indices(pairs) == [(0, 9), (1, 8), (2, 7)]
    assert [pair.margin for pair in pairs] == [9, 7, 5]


def test_free_pairs_are_all_of_the_best_with_all_of_the_worst_largest_margin_first() -> None:
    pairs = by_reward(distinct_answers(10), [scored(i, -i) for i in range(10)])
    assert set(indices(pairs)) == set(itertools.product([0, 1, 2], [7, 8, 9]))
    margins = [pair.margin for pair in pairs]
    assert margins == sorted(margins, reverse=True)


def test_only_answers_that_both_orders_agree_on_are_used() -> None:
    averages = [9, 1, 8, 7, 6, 5, 4, 0, 2, 3]  # answer 1 falls out of the top, 9 out of the bottom
    scores = [scored(i, -i, averages[i]) for i in range(10)]
    pairs = by_reward(distinct_answers(10), scores)
    assert {pair.chosen for pair in pairs} == {0, 2}
    assert {pair.rejected for pair in pairs} == {7, 8}


def test_distance_and_strict_follow_rank_both_act_as_named() -> None:
    """The ancestor passed `distance` in `strict_follow_rank`'s place: neither had any effect."""
    answers = [
        answer(i, " ".join(f"w{i}x{j}" for j in range(5 if i < 5 else 9))) for i in range(10)
    ]
    scores = [scored(i, -i) for i in range(10)]
    assert by_reward(answers, scores, distance=4) == []
    assert len(by_reward(answers, scores, distance=5)) == 9
    assert len(by_reward(answers, scores, distance=4, strict_follow_rank=True)) == 3


@pytest.mark.parametrize("num_answers", range(8))
def test_chosen_and_rejected_never_overlap_however_few_answers_there_are(num_answers: int) -> None:
    """With k < 2 * rank the ancestor raised TypeError or paired an answer with itself."""
    scores = [scored(i, -i) for i in range(num_answers)]
    for strict in (False, True):
        pairs = by_reward(distinct_answers(num_answers), scores, strict_follow_rank=strict)
        chosen = {pair.chosen for pair in pairs}
        rejected = {pair.rejected for pair in pairs}
        assert not chosen & rejected
        assert len(chosen) == len(rejected) == min(3, num_answers // 2)
    wins = rank_by_wins(SampleRewards(key="k", scores=scores), rank=3, strict_follow_rank=True)
    assert len(wins) == min(3, num_answers // 2)
    assert not {pair.chosen for pair in wins} & {pair.rejected for pair in wins}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a red circle", id="short"),
        pytest.param("yes", id="one-word"),
        pytest.param(" ".join(f"w{i}" for i in range(30)), id="long"),
    ],
)
def test_near_duplicates_of_any_length_are_removed(text: str) -> None:
    """Similarity over 10-grams never caught duplicates among answers under 10 words."""
    answers = [*(answer(i, text) for i in range(3)), answer(3, "something else entirely here")]
    scores = [scored(i, -i) for i in range(4)]
    assert indices(by_reward(answers, scores, strict_follow_rank=True)) == [(0, 3)]


def test_similarity_compares_texts_of_unequal_length() -> None:
    assert similarity(["yes"], ["yes", "it", "is"]) == pytest.approx(1 / 3)
    assert similarity([], []) == 1.0
    assert similarity([], ["yes"]) == 0.0
    long = [f"w{i}" for i in range(40)]
    assert similarity(long, long) == 1.0
    assert similarity(long, [*long[:-1], "other"]) == pytest.approx(30 / 32)


@pytest.mark.parametrize("compat", [None, "rlaifv"])
def test_the_ngrams_of_an_answer_are_built_once(
    monkeypatch: pytest.MonkeyPatch, compat: str | None
) -> None:
    """They were built anew for each of the 45 comparisons, in both orders and in both passes."""
    built = []
    build = ranking.ngrams
    monkeypatch.setattr(ranking, "ngrams", lambda text, n: built.append(text) or build(text, n))
    answers = [answer(i, " ".join(f"w{i}x{j}" for j in range(30))) for i in range(10)]
    assert by_reward(answers, [scored(i, -i) for i in range(10)], compat=compat)
    assert sorted(built) == sorted(words(one.text) for one in answers)


def test_equal_scores_make_no_pair() -> None:
    scores = [scored(i, 1.0) for i in range(10)]
    assert by_reward(distinct_answers(10), scores) == []
    assert rank_by_wins(SampleRewards(key="k", scores=scores), rank=3) == []
    assert rank_by_denied_facts(SampleRewards(key="k", scores=scores), seed=0) == []


def test_a_missing_score_takes_one_answer_out_and_shifts_nothing() -> None:
    """The ancestor cut its lists into runs of sample_k: one gap mixed up all later questions."""
    answers = distinct_answers(10)
    scores = [scored(i, -i) for i in range(10) if i not in (0, 4)]
    pairs = by_reward(answers, random.Random(0).sample(scores, len(scores)))
    assert set(indices(pairs)) == set(itertools.product([1, 2, 3], [7, 8, 9]))
    assert all((pair.chosen_score, pair.rejected_score) == (-pair.chosen, -pair.rejected)
               for pair in pairs)  # fmt: skip


def test_ranking_does_not_depend_on_the_order_of_the_scores() -> None:
    answers = distinct_answers(10)
    rng = random.Random(1)
    scores = [scored(i, i // 3, i // 2) for i in range(10)]
    expected = by_reward(answers, scores)
    assert expected
    for _ in range(20):
        assert by_reward(answers, rng.sample(scores, 10)) == expected


def test_denied_facts_pairs_are_drawn_by_seed_and_key_alone() -> None:
    """The ancestor's draw was unseeded: no run could be repeated."""
    scores = [scored(i, -(i % 4)) for i in range(10)]

    def draw(key: str, seed: int) -> list[tuple[int, int]]:
        return indices(rank_by_denied_facts(SampleRewards(key=key, scores=scores), seed=seed))

    assert draw("a", 0) == draw("a", 0)
    assert len(draw("a", 0)) == 2
    assert len({tuple(draw(key, 0)) for key in "abcdefgh"}) > 4
    assert len({tuple(draw("a", seed)) for seed in range(8)}) > 4


def test_denied_facts_pairs_differ_by_at_least_one_fact() -> None:
    scores = [scored(0, -0.0), scored(1, -0.5), scored(2, -2.0)]
    pairs = rank_by_denied_facts(SampleRewards(key="k", scores=scores), seed=0, num_pairs=99)
    assert indices(pairs) == [(0, 2), (1, 2)]


def test_wins_are_paired_widest_first_or_by_position() -> None:
    rewards = SampleRewards(key="k", scores=[scored(i, 9 - 2 * i) for i in range(10)])
    pairs = rank_by_wins(rewards, rank=3)
    assert set(indices(pairs)) == set(itertools.product([0, 1, 2], [7, 8, 9]))
    assert indices(pairs)[:3] == [(0, 9), (0, 8), (1, 9)]
    strict = rank_by_wins(rewards, rank=3, strict_follow_rank=True)
    assert sorted(indices(strict)) == [(0, 7), (1, 8), (2, 9)]


def test_pairs_of_wins_come_largest_margin_first() -> None:
    """A later filter keeps the first few of each sample; `compat` keeps the positions' order."""
    scores = [scored(i, value) for i, value in enumerate([5, 5, 4, 0])]
    rewards = SampleRewards(key="k", scores=scores)
    strict = rank_by_wins(rewards, rank=2, strict_follow_rank=True)
    assert indices(strict) == [(1, 3), (0, 2)]
    assert indices(rank_by_wins(rewards, rank=2, compat="rlaifv")) == [(0, 2), (1, 3)]


# The rules of the ancestor, slowly, from their description: text lists, nested loops.


def ancestor_ten_grams(text: str) -> set[str]:
    tokens = text.split()
    return {" ".join(tokens[i : i + 10]) for i in range(len(tokens)) if i + 10 <= len(tokens)}


def ancestor_unique(ordered: list[dict]) -> list[dict]:
    unique: list[dict] = []
    for row in ordered:
        mine = ancestor_ten_grams(row["text"])
        is_new = True
        for other in unique:
            theirs = ancestor_ten_grams(other["text"])
            if mine | theirs and len(mine & theirs) / len(mine | theirs) > 0.9:
                is_new = False
        if is_new:
            unique.append(row)
    return unique


def ancestor_dpo_reward(rows: list[dict], rank: int, distance: int, strict: bool) -> list:
    """None when fewer than 2 * rank answers survive: there the rule is not well defined."""
    orders = []
    for name in ("sum", "avg"):
        ordered = list(rows)
        ordered.sort(key=lambda row: row[name], reverse=True)  # stable: ties stay in order
        orders.append(ancestor_unique(ordered))
    by_sum, by_avg = orders
    if min(len(by_sum), len(by_avg)) < 2 * rank:
        return None
    best = [row for row in by_sum[:rank] if row["text"] in [r["text"] for r in by_avg[:rank]]]
    worst = [row for row in by_sum[-rank:] if row["text"] in [r["text"] for r in by_avg[-rank:]]]
    pairs = []
    if strict:
        for i in range(min(len(best), len(worst))):
            pairs.append((best[i]["index"], worst[i]["index"]))
    else:
        for chosen in best:
            for rejected in worst:
                difference = len(chosen["text"].split()) - len(rejected["text"].split())
                if abs(difference) < distance:
                    pairs.append((chosen["index"], rejected["index"]))
    return pairs


def random_rows(rng: random.Random) -> list[dict]:
    """Ten answers, some near-duplicates of 12 to 60 words, some short; scores with ties."""
    base = [f"w{rng.randrange(1000)}" for _ in range(60)]
    rows = []
    for index in range(10):
        if rng.random() < 0.4:
            text = base[: rng.choice([58, 59, 60])]
        else:
            text = [f"w{rng.randrange(1000)}" for _ in range(rng.randrange(3, 50))]
        text = [*text, f"end{index}"]  # membership is by text there, by index here
        total = rng.choice([rng.uniform(-3, 3), rng.randrange(-2, 3)])
        average = rng.choice([total, rng.uniform(-3, 3)])
        rows.append({"index": index, "text": " ".join(text), "sum": total, "avg": average})
    return rows


@pytest.mark.parametrize("strict", [False, True])
def test_compat_selects_what_the_ancestor_selects(strict: bool) -> None:
    rng = random.Random(2)
    num_compared = num_pairs = 0
    for _ in range(400):
        rows = random_rows(rng)
        expected = ancestor_dpo_reward(rows, rank=3, distance=15, strict=strict)
        if expected is None:
            continue
        pairs = by_reward(
            [answer(row["index"], row["text"]) for row in rows],
            [scored(row["index"], row["sum"], row["avg"]) for row in rows],
            distance=15,
            strict_follow_rank=strict,
            compat="rlaifv",
        )
        assert indices(pairs) == expected
        num_compared += 1
        num_pairs += len(pairs)
    assert num_compared > 200
    assert num_pairs > 200


def test_compat_never_pairs_a_lower_answer_over_a_higher_one() -> None:
    """Where top and bottom overlap the ancestor also paired answers backwards."""
    for num_answers in range(7):
        scores = [scored(i, -i) for i in range(num_answers)]
        for strict in (False, True):
            pairs = by_reward(
                distinct_answers(num_answers), scores, strict_follow_rank=strict, compat="rlaifv"
            )
            assert all(pair.chosen < pair.rejected for pair in pairs)


def test_compat_keeps_short_duplicates_as_the_ancestor_did() -> None:
    answers = [answer(i, "a red circle") for i in range(10)]
    scores = [scored(i, -i) for i in range(10)]
    assert by_reward(answers, scores) == []
    assert len(by_reward(answers, scores, compat="rlaifv")) == 9


def test_compat_wins_pair_equal_scores_too() -> None:
    rng = random.Random(3)
    for _ in range(100):
        values = [rng.randrange(-3, 4) for _ in range(10)]
        rewards = SampleRewards(key="k", scores=[scored(i, v) for i, v in enumerate(values)])
        order = sorted(range(10), key=lambda i: -values[i])  # stable
        expected = [(order[i], order[7 + i]) for i in range(3)]
        assert indices(rank_by_wins(rewards, rank=3, compat="rlaifv")) == expected


def test_compat_denied_facts_candidates_are_the_ancestors() -> None:
    rng = random.Random(4)
    for _ in range(50):
        values = [-rng.randrange(4) for _ in range(6)]
        rewards = SampleRewards(key="k", scores=[scored(i, v) for i, v in enumerate(values)])
        expected = set()
        for i in range(6):
            for j in range(6):
                if values[i] - values[j] >= 1:
                    expected.add((i, j))
        everything = rank_by_denied_facts(rewards, seed=0, num_pairs=999)
        assert set(indices(everything)) == expected
        drawn = rank_by_denied_facts(rewards, seed=0)
        assert set(indices(drawn)) <= expected
        assert len(drawn) == min(2, len(expected))
