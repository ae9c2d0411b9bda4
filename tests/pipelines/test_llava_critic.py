"""llava_critic, with words put into the critic's mouth; prompts and tokenizers are real."""

from __future__ import annotations

import re
from itertools import permutations

import pytest

from stream_engine.errors import ConfigError
from stream_engine.pipelines import prompts
from stream_engine.pipelines.judge import COUNTERS
from stream_engine.records import Failure, SampleRewards
from tests.pipelines.conftest import (
    judged,
    load_engines,
    make_samples,
    put_words,
    rollouts_of,
)

ASKED = re.compile(
    r"The first response: \[(?P<first>.*?)\]\nThe second response: \[(?P<second>.*?)\]", re.DOTALL
)


def answers_asked(asked: str) -> tuple[str, str]:
    match = ASKED.search(asked)
    assert match, asked
    return match["first"], match["second"]


def longer_is_better(asked: str) -> str:
    first, second = answers_asked(asked)
    better = "first" if len(first) > len(second) else "second"
    return f"I looked closely. The {better} response is better."


def run(make_pipeline, reply, texts, num_samples=1, **options):
    pipeline = make_pipeline("llava_critic", pipeline_options=options, sample_k=len(texts))
    engines = load_engines(pipeline)
    asked = put_words(engines["critic"], reply)
    samples = make_samples(num_samples)
    rewards = judged(pipeline, engines, [(s, rollouts_of(s, texts)) for s in samples])
    return pipeline, asked, [rewards[sample.key] for sample in samples]


def net_wins(rewards: SampleRewards) -> list[int]:
    """Wins minus losses of every answer with a score."""
    return [score.scores["wins"] - score.scores["losses"] for score in rewards.scores]


def test_the_score_is_the_strength_that_the_verdicts_show(make_pipeline):
    texts = ["aa", "a a a a", "aaa", "a"]
    _, asked, [rewards] = run(make_pipeline, longer_is_better, texts)
    assert net_wins(rewards) == [-1, 3, 1, -3]
    best, second, third, worst = sorted((s.score for s in rewards.scores), reverse=True)
    assert best > second > third > worst
    assert (best, second) == pytest.approx((-worst, -third), abs=1e-2)
    _, _, [wins] = run(make_pipeline, longer_is_better, texts, critic_scores="wins")
    assert [score.score for score in wins.scores] == [-1.0, 3.0, 1.0, -3.0]
    assert rewards.scores[2].scores == {"wins": 2, "losses": 1, "ties": 0}
    assert len(asked) == 12
    assert sorted(map(answers_asked, asked)) == sorted(
        permutations(["aa", "a a a a", "aaa", "a"], 2)
    )
    counted = {
        "comparisons": 12,
        "matches": 6,
        "won": 6,
        "won_unequal_length": 3,
        "won_by_longer": 3,
        "verdict_first": 6,
        "verdict_second": 6,
    }
    assert {name: rewards.judge[name] for name in counted} == counted
    assert not rewards.judge.get("flips") and not rewards.judge.get("ties")


def test_the_critic_is_asked_in_the_published_words(make_pipeline):
    _, asked, _ = run(make_pipeline, longer_is_better, ["{b}", "aaaa"])
    words = prompts.CRITIC.format("Describe the image.", "{b}", "aaaa")
    assert words in asked[0]
    assert asked[0].endswith("[aaaa]\nASSISTANT:\n ASSISTANT:")


def test_a_verdict_that_flips_with_the_order_is_a_tie(make_pipeline):
    def reply(asked: str) -> str:
        pair = answers_asked(asked)
        if pair == ("good", "poor"):
            return "[first]"
        if pair == ("poor", "good"):
            return "[second]"
        if "other" in pair:
            return "Two responses are equally good." if pair[0] == "other" else "[first]"
        raise AssertionError(pair)

    _, _, [rewards] = run(make_pipeline, reply, ["good", "poor", "other"])
    assert net_wins(rewards) == [1, -1, 0]
    assert (rewards.judge["ties"], rewards.judge.get("flips", 0)) == (2, 0)  # equal, then first

    always_first = lambda asked: "[first]"  # noqa: E731
    _, _, [rewards] = run(make_pipeline, always_first, ["good", "poor", "other"])
    assert [score.score for score in rewards.scores] == [0.0, 0.0, 0.0]
    assert (rewards.judge["flips"], rewards.judge["ties"], rewards.judge["matches"]) == (3, 3, 3)


def test_compat_sums_as_the_ancestor_did(make_pipeline):
    """An independent sum: the verdict of (i, j) counts for i alone; what is unread counts 0."""
    said = {
        (0, 1): "[first]",
        (1, 0): "[first]",
        (0, 2): "The second response is better",
        (2, 0): "who knows",
        (1, 2): "Both responses are equally good",
        (2, 1): "the first response is better",  # lower case: not the ancestor's phrase
    }
    texts = ["one", "two", "one"]  # repeated texts compete in compat

    pipeline = make_pipeline(
        "llava_critic", pipeline_options={"critic_compat": "rlaifv"}, sample_k=3, rank=1
    )
    engines = load_engines(pipeline)
    replies = iter([said[p] for p in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))])
    put_words(engines["critic"], lambda asked: next(replies))
    [sample] = make_samples(1)
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert [score.score for score in rewards.scores] == [1.0 - 1.0, 1.0 + 0.0, 0.0 + 0.0]
    assert rewards.judge["verdict_unparsed"] == 2


def test_compat_ranks_by_wins_minus_losses(make_pipeline):
    """Its rules pair by position, equal scores too, whatever the default has come to be."""
    texts = ["a" * n for n in (3, 1, 5, 2, 4, 6)]
    pipeline = make_pipeline("llava_critic", sample_k=6, rank=2, compat="rlaifv")
    engines = load_engines(pipeline)
    put_words(engines["critic"], longer_is_better)
    [sample] = make_samples(1)
    rollouts = rollouts_of(sample, texts)
    [rewards] = judged(pipeline, engines, [(sample, rollouts)]).values()
    pairs = pipeline.candidate_pairs(rollouts, rewards)
    assert [(p.chosen, p.rejected) for p in pairs] == [(5, 3), (2, 1)]
    assert [(p.chosen_score, p.rejected_score) for p in pairs] == [(5.0, -3.0), (3.0, -5.0)]


def test_verdicts_and_reasoning_are_kept_to_be_read(make_pipeline):
    _, _, [rewards] = run(make_pipeline, longer_is_better, ["aa", "aaa"])
    said = "I looked closely. The {} response is better."
    assert rewards.details["comparisons"] == [
        {"first": 0, "second": 1, "verdict": "second", "reply": said.format("second")},
        {"first": 1, "second": 0, "verdict": "first", "reply": said.format("first")},
    ]


def test_equal_answers_are_not_compared_and_share_a_score(make_pipeline):
    _, asked, [rewards] = run(make_pipeline, longer_is_better, ["aa", "aaa", "aa", "a"])
    assert len(asked) == 6
    assert net_wins(rewards) == [0, 2, 0, -2]
    assert rewards.scores[0].score == rewards.scores[2].score
    assert rewards.judge["identical"] == 1
    assert rewards.scores[2].details == {"same_text_as": 0}
    _, asked, [rewards] = run(make_pipeline, longer_is_better, ["aa", "aa"])
    assert asked == []
    assert rewards.unscored == {"not_compared": [0, 1]}


def test_unparsed_replies_are_counted_and_leave_no_score(make_pipeline):
    def reply(asked: str) -> str | None:
        return None if "mystery" in answers_asked(asked) else longer_is_better(asked)

    _, _, [rewards] = run(make_pipeline, reply, ["aa", "mystery", "aaa"])
    assert rewards.unscored == {"no_verdict": [1]}
    assert rewards.judge["verdict_unparsed"] == 4
    assert [score.index for score in rewards.scores] == [0, 2]
    assert net_wins(rewards) == [-1, 1]


@pytest.mark.parametrize("schedule", ["all", "swiss", 1, 3, 7])
def test_no_more_is_asked_than_was_planned(make_pipeline, schedule):
    texts = ["a" * n for n in (3, 1, 5, 2, 4)]
    pipeline, asked, rewards = run(
        make_pipeline, longer_is_better, texts, num_samples=3, critic_pairs=schedule
    )
    assert len(asked) == pipeline.planned_calls(3)["critic"]
    assert {r.judge["comparisons"] for r in rewards} == {len(asked) / 3}


def test_swiss_finds_the_best_and_the_worst_with_half_the_calls(make_pipeline):
    texts = ["a" * n for n in (3, 1, 7, 2, 4, 8, 5, 6)]
    _, asked, [rewards] = run(make_pipeline, longer_is_better, texts, critic_pairs="swiss")
    assert len(asked) == len(set(asked)) == 24 < 56
    by_score = sorted(rewards.scores, key=lambda score: score.score)
    assert texts[by_score[-1].index] == "a" * 8
    assert texts[by_score[0].index] == "a"


def test_few_matches_are_scored_by_the_strength_of_those_who_were_met(make_pipeline):
    """Wins minus losses let a win over the worst answer count as much as one over the best."""
    texts = ["a" * n for n in (3, 1, 7, 2, 4, 8, 5, 6)]
    _, _, [few] = run(make_pipeline, longer_is_better, texts, critic_pairs="swiss")
    _, _, [wins] = run(
        make_pipeline, longer_is_better, texts, critic_pairs="swiss", critic_scores="wins"
    )
    assert all(
        score.score == score.scores["wins"] - score.scores["losses"] for score in wins.scores
    )
    assert len({score.score for score in few.scores}) > len({score.score for score in wins.scores})
    by_strength = sorted(few.scores, key=lambda score: -score.score)
    assert (len(texts[by_strength[0].index]), len(texts[by_strength[-1].index])) == (8, 1)


def test_a_comparison_too_long_for_the_critic_is_not_asked(make_pipeline):
    _, asked, [rewards] = run(make_pipeline, longer_is_better, ["aa", "x" * 5000, "aaa"])
    assert len(asked) == 2
    assert rewards.judge["not_asked"] == 4
    assert rewards.unscored == {"no_verdict": [1]}


def test_a_sample_whose_image_cannot_be_decoded_fails_alone(make_pipeline):
    pipeline = make_pipeline("llava_critic")
    engines = load_engines(pipeline)
    put_words(engines["critic"], longer_is_better)
    good, bad = make_samples(2)
    broken = type(bad.images[0])(b"no picture")
    bad = type(bad)(key=bad.key, idx=bad.idx, question=bad.question, images=(broken,))
    cases = [(sample, rollouts_of(sample, ["a", "aa"])) for sample in (good, bad)]
    outcomes = {o.key: o for o in pipeline.rewards(engines, cases)}
    assert isinstance(outcomes[bad.key], Failure)
    assert outcomes[bad.key].reason == "undecodable_image"
    assert net_wins(outcomes[good.key]) == [-1, 1]


def test_only_counters_with_a_meaning_are_used(make_pipeline):
    replies = iter(
        ["[first]", "[second]", "huh", "[first]", "[first]", "Two responses are equally"]
    )
    pipeline, _, [rewards] = run(make_pipeline, lambda asked: next(replies), ["a", "b", "c"])
    assert set(rewards.judge) <= set(COUNTERS)
    assert {name for rate in pipeline.judge_rates.values() for name in rate} <= set(COUNTERS)


def test_options_are_checked(make_pipeline):
    for options in ({"critic_pairs": 0}, {"critic_pairs": "some"}, {"critic_compat": "other"}):
        with pytest.raises(ConfigError):
            make_pipeline("llava_critic", pipeline_options=options)
    with pytest.raises(ConfigError, match="needs critic_pairs all"):
        options = {"critic_compat": "rlaifv", "critic_pairs": "swiss"}
        make_pipeline("llava_critic", pipeline_options=options)
    assert make_pipeline("llava_critic", pipeline_options={"critic_pairs": "12"}).planned_calls(1)


def test_the_critic_writes_with_its_own_sampling(make_pipeline):
    pipeline = make_pipeline("llava_critic", temperature=1.5)
    engines = load_engines(pipeline)
    sampling = engines["critic"].sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.7, 512)
    assert engines["instruct"].sampling.temperature == 1.5
