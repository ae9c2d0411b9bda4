"""divide_and_conquer, with words put into the models' mouths; prompts and tokenizers are real."""

from __future__ import annotations

import re

import pytest

from stream_engine.config import SamplingConfig
from stream_engine.errors import ConfigError
from stream_engine.pipelines import prompts
from stream_engine.pipelines.judge import COUNTERS
from stream_engine.records import AnswerScore, Failure, Sample, SampleRewards
from tests.pipelines.conftest import (
    judged,
    load_engines,
    make_samples,
    put_opinions,
    put_words,
    rollouts_of,
)

TRUE = {"the cat is red", "the dog is big"}


def split(asked: str) -> str | None:
    """Sentences of the answer, as facts."""
    answer = asked.rpartition("\nAnswer: ")[2].removesuffix("ASSISTANT:").strip()
    if answer == "babble":
        return "colourless green"
    if answer == "endless":
        return None
    facts = [part.strip() for part in answer.split(".") if part.strip()]
    return "### Facts:\n" + "\n".join(f"- {fact}" for fact in facts if fact != "hmm")


def facts_asked(asked: str) -> list[str]:
    listed = asked.rpartition("### Declarative sentences:")[2].removesuffix("ASSISTANT:")
    return re.findall(r"- (.*?)\s*$", listed, re.MULTILINE)


def rewrite(asked: str) -> str:
    return "### Modified sentences:\n" + "\n".join(f"- so: {fact}?" for fact in facts_asked(asked))


def check(asked: str) -> float:
    """p(yes) of the question that was asked."""
    fact = re.search(r"so: (.*?)\? Please answer yes or no\. ASSISTANT:$", asked)
    assert fact, asked
    return 0.9 if fact[1] in TRUE else 0.2


@pytest.fixture
def pipeline(make_pipeline):
    return make_pipeline("divide_and_conquer")


@pytest.fixture
def engines(pipeline):
    return load_engines(pipeline)


def test_the_score_is_minus_the_number_of_denied_facts(pipeline, engines):
    [sample] = make_samples(1)
    put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    put_opinions(engines["auto_check"], check, mass=0.75)
    texts = ["the cat is red.", "the cat is blue. the dog is big.", "a. b. the dog is big."]
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert [score.score for score in rewards.scores] == [0.0, -1.0, -2.0]
    assert [score.scores["facts"] for score in rewards.scores] == [1, 2, 3]
    facts = rewards.scores[1].details["facts"]
    assert [fact["fact"] for fact in facts] == ["the cat is blue", "the dog is big"]
    assert [fact["question"] for fact in facts] == ["so: the cat is blue?", "so: the dog is big?"]
    assert [fact["holds"] for fact in facts] == [False, True]
    assert facts[1]["p_yes"] == pytest.approx(0.9 * 0.75)
    assert facts[0]["p_no"] == pytest.approx(0.8 * 0.75)
    assert rewards.judge["outside_mass"] == pytest.approx(5 * 0.25)  # "the dog is big" once
    assert {k: rewards.judge[k] for k in ("answers", "answers_judged", "facts")} == {
        "answers": 3,
        "answers_judged": 3,
        "facts": 6,
    }
    assert (rewards.judge["facts_denied"], rewards.judge["facts_checked"]) == (3, 5)


def test_models_are_asked_in_the_published_words(pipeline, engines):
    [sample] = make_samples(1)
    asked_split = put_words(engines["split"], split)
    asked_rewrite = put_words(engines["question_change"], rewrite)
    asked_check = put_opinions(engines["auto_check"], check)
    judged(pipeline, engines, [(sample, rollouts_of(sample, ["a. b."]))])
    assert asked_split[0].endswith(
        "### Question-answer pair:\nQuestion: Describe the image.\nAnswer: a. b. ASSISTANT:"
    )
    assert prompts.SPLIT in asked_split[0]
    assert asked_rewrite[0].endswith("### Declarative sentences:\n- a\n\n- b\n ASSISTANT:")
    assert prompts.REWRITE in asked_rewrite[0]
    assert [text.rpartition("\n")[2] for text in asked_check] == [
        "so: a? Please answer yes or no. ASSISTANT:",
        "so: b? Please answer yes or no. ASSISTANT:",
    ]


def test_equal_questions_and_equal_answers_are_judged_once(pipeline, engines):
    [sample] = make_samples(1)
    asked_split = put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    asked_check = put_opinions(engines["auto_check"], check)
    texts = ["a. b.", "b. a.", "a. b.", "a. a."]
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert len(asked_split) == 3
    assert len(asked_check) == 2
    assert [score.score for score in rewards.scores] == [-2.0, -2.0, -2.0, -2.0]
    assert rewards.scores[2].details == {"same_text_as": 0}
    assert rewards.judge["facts"] == 8


def test_unequal_counts_are_asked_again_fact_by_fact_and_never_mispaired(pipeline, engines):
    """RLAIF-V zipped two lists of different lengths, so that verdicts went to other facts."""
    [sample] = make_samples(1)
    put_words(engines["split"], split)

    def loses_one(asked: str) -> str:
        facts = facts_asked(asked)
        if facts == ["c"]:
            return "- so: c1?\n- so: c2?"
        return "\n".join(f"- so: {fact}?" for fact in facts[len(facts) > 1 :])

    asked = put_words(engines["question_change"], loses_one)
    put_opinions(engines["auto_check"], check)
    texts = ["a. the cat is red.", "b. c.", "the dog is big."]
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert [facts_asked(text) for text in asked] == [
        ["a", "the cat is red"],
        ["b", "c"],
        ["the dog is big"],
        ["a"],
        ["the cat is red"],
        ["b"],
        ["c"],
    ]
    assert rewards.unscored == {"question_count_mismatch": [1]}
    assert [(score.index, score.score) for score in rewards.scores] == [(0, -1.0), (2, 0.0)]
    facts = rewards.scores[0].details["facts"]
    assert [(f["fact"], f["question"], f["holds"]) for f in facts] == [
        ("a", "so: a?", False),
        ("the cat is red", "so: the cat is red?", True),
    ]
    assert (rewards.judge["asked_again"], rewards.judge["question_count_mismatch"]) == (2, 1)
    assert rewards.details["unread"] == {"question/1/1": "- so: c1?\n- so: c2?"}


def test_what_does_not_parse_is_counted_and_kept_to_be_read(pipeline, engines):
    [sample] = make_samples(1)
    put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    put_opinions(engines["auto_check"], check)
    texts = ["babble", "hmm.", "endless", "babble", "the cat is red."]
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert rewards.unscored == {"split_unparsed": [0, 2, 3], "no_facts": [1]}
    assert rewards.judge["split_unparsed"] == 3
    assert (rewards.judge["split_cut"], rewards.judge["no_facts"]) == (1, 1)
    assert rewards.details["unread"]["split/0"] == "colourless green"
    assert [score.index for score in rewards.scores] == [4]


def test_a_cut_list_loses_its_last_line_only(pipeline, engines):
    [sample] = make_samples(1)

    def cut_rewrite(asked: str) -> str | None:
        return None  # one cut line: nothing whole

    put_words(engines["split"], split)
    put_words(engines["question_change"], cut_rewrite)
    put_opinions(engines["auto_check"], check)
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, ["a."]))]).values()
    assert rewards.unscored == {"question_count_mismatch": [0]}


def test_a_sample_whose_image_cannot_be_decoded_fails_alone(pipeline, engines):
    good, bad = make_samples(2)
    broken = type(bad.images[0])(b"no picture")
    bad = type(bad)(key=bad.key, idx=bad.idx, question=bad.question, images=(broken,))
    put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    cases = [(sample, rollouts_of(sample, ["a. b."])) for sample in (good, bad)]
    outcomes = {o.key: o for o in pipeline.rewards(engines, cases)}
    assert isinstance(outcomes[bad.key], Failure)
    assert outcomes[bad.key].reason == "undecodable_image"
    assert outcomes[good.key].scores[0].scores["facts"] == 2


def test_an_answer_too_long_for_the_split_model_is_left_out_alone(pipeline, engines):
    [sample] = make_samples(1)
    put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    put_opinions(engines["auto_check"], check)
    cases = [(sample, rollouts_of(sample, ["x" * 5000, "the cat is red."]))]
    [rewards] = judged(pipeline, engines, cases).values()
    assert rewards.unscored == {"prompt_too_long": [0]}
    assert [score.index for score in rewards.scores] == [1]


def test_a_fact_too_long_for_the_judge_leaves_its_answer_out_alone(pipeline, engines):
    [sample] = make_samples(1)
    put_words(engines["split"], split)
    long = lambda asked: rewrite(asked).replace("so: a", "so: " + "a" * 5000)  # noqa: E731
    put_words(engines["question_change"], long)
    cases = [
        (sample, rollouts_of(sample, ["a. b.", "the cat is red."])),
    ]
    [rewards] = judged(pipeline, engines, cases).values()
    assert rewards.unscored == {"prompt_too_long": [0]}
    assert [score.index for score in rewards.scores] == [1]


def test_only_counters_with_a_meaning_are_used(pipeline, engines):
    [sample] = make_samples(1)
    put_words(engines["split"], split)
    put_words(engines["question_change"], rewrite)
    put_opinions(engines["auto_check"], check)
    texts = ["babble", "hmm.", "endless", "a. b."]
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, texts))]).values()
    assert set(rewards.judge) <= set(COUNTERS)
    assert {name for rate in pipeline.judge_rates.values() for name in rate} <= set(COUNTERS)


def test_roles_take_three_paths_in_the_ancestors_order(make_pipeline, checkpoint):
    pipeline = make_pipeline("divide_and_conquer", reward_model_path="A, B,C")
    roles = {role.name: role for role in pipeline.roles()}
    assert {name: roles[name].path for name in ("auto_check", "question_change", "split")} == {
        "auto_check": "A",
        "question_change": "B",
        "split": "C",
    }
    assert {role.name for role in roles.values() if role.stage == "rewards"} == {
        "auto_check",
        "question_change",
        "split",
    }
    for wrong in ("A,B", "A,B,C,D", "A,,C"):
        with pytest.raises(ConfigError, match="auto_check,question_change,split"):
            make_pipeline("divide_and_conquer", reward_model_path=wrong).roles()


def test_text_models_write_with_their_own_sampling(make_pipeline):
    options = {"text_max_new_tokens": 33}
    pipeline = make_pipeline("divide_and_conquer", pipeline_options=options, temperature=1.5)
    engines = load_engines(pipeline)
    for role in ("split", "question_change"):
        sampling = engines[role].sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.2, 0.9, 33)
    assert engines["instruct"].sampling.temperature == 1.5
    assert pipeline.settings("rewards")["text_max_new_tokens"] == 33
    assert isinstance(pipeline.roles()[1].sampling, SamplingConfig)


def test_pairs_are_drawn_or_of_equal_place_and_the_choice_shapes_no_score(make_pipeline):
    sample = Sample(key="k", idx="0", question="what")
    rollouts = rollouts_of(sample, [f"answer {i}" for i in range(6)])
    scores = [AnswerScore(index=i, score=float(-i), scores={}) for i in range(6)]
    rewards = SampleRewards(key="k", scores=scores)
    given = {"strict_follow_rank": True, "sample_k": 6, "rank": 3}
    ranked = make_pipeline("divide_and_conquer", pipeline_options={"fact_pairs": "ranked"}, **given)
    pairs = [(pair.chosen, pair.rejected) for pair in ranked.candidate_pairs(rollouts, rewards)]
    assert sorted(pairs) == [(0, 3), (1, 4), (2, 5)]
    drawn = make_pipeline("divide_and_conquer", **given)
    assert len(drawn.candidate_pairs(rollouts, rewards)) == 2
    assert drawn.settings("rewards") == ranked.settings("rewards")
