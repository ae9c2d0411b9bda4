"""The committed checkpoints do what they were trained for, on pictures they have not seen."""

from collections.abc import Iterator

import pytest
import torch

from stream_engine.demo import checkpoint_path
from stream_engine.demo import tiny_llava as vlm
from stream_engine.pipelines import prompts as asked
from tests.demo_training import measure, prompts


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def instruct() -> vlm.TinyLlava:
    return vlm.load_checkpoint(checkpoint_path("instruct")).eval()


def test_reward_ranks_sampled_answers_by_truth(instruct: vlm.TinyLlava) -> None:
    reward = vlm.load_checkpoint(checkpoint_path("reward")).eval()
    found = measure.measure_pairs(instruct, reward, 20)
    assert found["pairs"] == 60
    assert found["pair_accuracy"] >= 0.95
    assert found["enough_distinct"] >= 0.95
    histogram = found["wrong_facts_histogram"]
    assert min(histogram[:4]) >= 10, "sampled answers must differ in truth"


def test_judge_tells_true_facts_from_false_ones(instruct: vlm.TinyLlava) -> None:
    judge = vlm.load_checkpoint(checkpoint_path("judge")).eval()
    found = measure.measure_judge(instruct, judge, 15)
    assert found["facts"] >= 100
    assert 0.3 < found["share_true"] < 0.7
    assert found["yes_no_accuracy"] >= 0.95


def test_critic_prefers_the_truer_answer_in_either_order(instruct: vlm.TinyLlava) -> None:
    critic = vlm.load_checkpoint(checkpoint_path("critic")).eval()
    found = measure.measure_critic(instruct, critic, 8)
    assert found["agreement_when_counts_differ"] >= 0.7  # of few pictures; chance is 0.33
    assert found["consistent_under_swap"] >= 0.75


def test_text_model_splits_and_rewrites_word_for_word() -> None:
    found = measure.measure_text(checkpoint_path("text"), 24)
    for task in ("split", "rewrite"):
        assert found[task]["format"] == 1.0
        assert found[task]["exact"] >= 0.9


def test_models_were_trained_on_the_prompts_that_the_pipelines_ask_with() -> None:
    facts = ["The top left is empty.", "There is one shape."]
    assert prompts.split_prompt("Why?", "So.") == asked.split_prompt("Why?", "So.")
    assert prompts.rewrite_prompt(facts) == asked.rewrite_prompt(facts)
    assert prompts.YES_NO_PROMPT.format("Why?") == asked.yes_no_prompt("Why?")
    assert prompts.CRITIC_PROMPT.format("Why?", "a", "b") == asked.critic_prompt("Why?", "a", "b")
