"""Measure demo checkpoints on held-out pictures, with plain transformers modules.

    python -m tests.demo_training.measure --out stream_engine/demo/checkpoints --count 200

Prints one line of JSON for each of the checkpoints present.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.facts import count_wrong_facts, read_facts
from stream_engine.demo.world import Picture, make_picture
from tests.demo_training.prompts import CRITIC_PROMPT
from tests.demo_training.text import prompt_text, write_task
from tests.demo_training.verdicts import yes_no_prompt

HELD_OUT_SEED = 977
SAMPLE_K, RANK, DISTANCE, PAIRS_PER_QUESTION, BETA = 10, 3, 25, 3, 0.1


def pixels_of(picture: Picture) -> Tensor:
    return vlm.to_pixels([Image.open(io.BytesIO(picture.png)).convert("RGB")])[0]


def held_out(count: int) -> Iterable[Picture]:
    return (make_picture(HELD_OUT_SEED, number) for number in range(count))


@torch.no_grad()
def token_differences(
    instruct: vlm.TinyLlava,
    reward: vlm.TinyLlava,
    pixels: Tensor,
    question: str,
    answers: list[str],
) -> list[Tensor]:
    """log p_reward - log p_instruct of each answer's tokens, the end token included."""
    suffix_ids, labels = instruct.batch([(question, answer) for answer in answers])
    difference = reward(pixels[None], suffix_ids, labels)
    difference -= instruct(pixels[None], suffix_ids, labels)
    return [row[wanted] for row, wanted in zip(difference, labels[:, 1:] != vlm.IGNORE)]


def rank_answers(answers: list[str], differences: list[Tensor]) -> list[tuple[str, str]]:
    """The ancestor's rule: best of both orders against worst of both, at most 3 pairs."""
    scores = {
        a: (BETA * d.sum().item(), BETA * d.mean().item())
        for a, d in zip(answers, differences, strict=True)
    }
    orders = [
        [a for a, _ in sorted(scores.items(), key=lambda item: -item[1][0])],
        [a for a, _ in sorted(scores.items(), key=lambda item: -item[1][1])],
    ]
    best = [a for a in orders[0][:RANK] if a in orders[1][:RANK]]
    worst = [a for a in orders[0][-RANK:] if a in orders[1][-RANK:]]
    pairs = [
        (chosen, rejected)
        for chosen, rejected in itertools.product(best, worst)
        if abs(len(chosen.split()) - len(rejected.split())) < DISTANCE
        and scores[chosen][0] > scores[rejected][0]
    ]
    return pairs[:PAIRS_PER_QUESTION]


def measure_pairs(instruct: vlm.TinyLlava, reward: vlm.TinyLlava, count: int) -> dict[str, object]:
    """Pair accuracy of dpo_reward on held-out pictures, and what the samples look like."""
    generator = torch.Generator().manual_seed(0)
    distinct, pairs, enough, won = 0, 0, 0, 0.0
    wrong_counts: list[int] = []
    words: list[int] = []
    for picture in held_out(count):
        pixels = pixels_of(picture)
        answers = draw_answers(instruct, picture, pixels, SAMPLE_K, generator)
        distinct += len(answers)
        enough += len(answers) >= 2 * RANK
        wrong = {a: count_wrong_facts(picture.scene, picture.question, a) for a in answers}
        wrong_counts += wrong.values()
        words += [len(answer.split()) for answer in answers]
        if len(answers) < 2 * RANK:
            continue
        differences = token_differences(instruct, reward, pixels, picture.question, answers)
        for chosen, rejected in rank_answers(answers, differences):
            pairs += 1
            won += 0.5 * (1 + (wrong[chosen] < wrong[rejected]) - (wrong[chosen] > wrong[rejected]))
    return {
        "pairs": pairs,
        "pair_accuracy": won / max(1, pairs),
        "distinct_of_10": distinct / count,
        "enough_distinct": enough / count,
        "wrong_facts_histogram": [wrong_counts.count(n) for n in range(6)],
        "words_min_max": [min(words), max(words)],
    }


@torch.no_grad()
def measure_judge(instruct: vlm.TinyLlava, judge: vlm.TinyLlava, count: int) -> dict[str, object]:
    """Accuracy of p(yes) > p(no) on the facts of sampled answers."""
    generator = torch.Generator().manual_seed(0)
    yes, no = (
        [judge.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
        for words in (("yes", "Yes"), ("no", "No"))
    )
    right: list[bool] = []
    said_of_true: list[bool] = []
    for picture in held_out(count):
        pixels = pixels_of(picture)
        for answer in draw_answers(instruct, picture, pixels, 2, generator):
            for fact in read_facts(answer, picture.question):
                if fact is None:
                    continue
                ids = torch.tensor([judge.suffix(yes_no_prompt(fact))[0]])
                hidden, _ = judge.prefill(pixels[None], ids)
                probs = judge.lm.lm_head(hidden[0, -1]).float().softmax(-1)
                says_yes = bool(probs[yes].sum() > probs[no].sum())
                right.append(says_yes == fact.holds(picture.scene))
                said_of_true.append(fact.holds(picture.scene))
    return {
        "facts": len(right),
        "yes_no_accuracy": sum(right) / len(right),
        "share_true": sum(said_of_true) / len(right),
    }


def measure_critic(instruct: vlm.TinyLlava, critic: vlm.TinyLlava, count: int) -> dict[str, object]:
    """Agreement with the truth and under swap, sampled at temperature 0.7 as the pipeline does."""
    generator = torch.Generator().manual_seed(0)
    agreed: list[bool] = []
    ties: list[bool] = []
    consistent: list[bool] = []
    for picture in held_out(count):
        pixels = pixels_of(picture)
        answers = draw_answers(instruct, picture, pixels, 4, generator)
        for one, other in itertools.pairwise(answers):
            verdicts = []
            for first, second in ((one, other), (other, one)):
                prompt = CRITIC_PROMPT.format(picture.question, first, second)
                row = critic.sample(pixels, prompt, count=1, temperature=0.7, generator=generator)[
                    0
                ]
                verdict = read_verdict(critic.text(row))
                wrong = [
                    count_wrong_facts(picture.scene, picture.question, a) for a in (first, second)
                ]
                true_verdict = (wrong[1] > wrong[0]) - (wrong[1] < wrong[0])
                (agreed if true_verdict else ties).append(verdict == true_verdict)
                verdicts.append(verdict)
            consistent.append(verdicts[0] is not None and verdicts[0] == -(verdicts[1] or 0))
    return {
        "verdicts": len(agreed) + len(ties),
        "agreement_when_counts_differ": sum(agreed) / max(1, len(agreed)),
        "agreement_when_counts_are_equal": sum(ties) / max(1, len(ties)),
        "consistent_under_swap": sum(consistent) / len(consistent),
    }


def read_verdict(text: str) -> int | None:
    """+1: the first response is better, -1: the second, 0: equal, None: no verdict."""
    for value, phrase in (
        (1, "The first response is better"),
        (-1, "The second response is better"),
        (0, "Two responses are equally"),
    ):
        if phrase in text:
            return value
    return None


def draw_answers(
    instruct: vlm.TinyLlava,
    picture: Picture,
    pixels: Tensor,
    count: int,
    generator: torch.Generator,
) -> list[str]:
    """Different answers among `count` sampled ones."""
    rows = instruct.sample(
        pixels, picture.question, count=count, temperature=0.7, generator=generator
    )
    return list(dict.fromkeys(instruct.text(row) for row in rows))


@torch.no_grad()
def measure_text(folder: Path, count: int) -> dict[str, object]:
    """Share of greedy outputs that are, word for word, what they should be, and well formed."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random("held-out text")
    exact: dict[str, list[bool]] = {"split": [], "rewrite": []}
    formed: dict[str, list[bool]] = {"split": [], "rewrite": []}
    for _ in range(count):
        prompt, expected = write_task(rng, mixed_share=0.0)
        kind = "split" if expected.startswith("### Facts") else "rewrite"
        ids = tokenizer(
            prompt_text(tokenizer, prompt), add_special_tokens=False, return_tensors="pt"
        ).input_ids
        out = model.generate(ids, do_sample=False, temperature=None, max_new_tokens=128)
        answer = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        exact[kind].append(answer == expected)
        starts = [line[:2] for line in answer.splitlines()]
        formed[kind].append(starts == [line[:2] for line in expected.splitlines()])
    return {
        name: {"exact": sum(exact[name]) / len(exact[name]), "format": sum(f) / len(f)}
        for name, f in formed.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--count", type=int, default=200)
    names = ["reward", "judge", "critic", "text"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    instruct = vlm.load_checkpoint(args.out / "instruct").eval()
    measures = {"reward": measure_pairs, "judge": measure_judge, "critic": measure_critic}
    for name, measure in measures.items():
        if name in args.only and (args.out / name).exists():
            model = vlm.load_checkpoint(args.out / name).eval()
            print(json.dumps({name: measure(instruct, model, args.count)}), flush=True)
    if "text" in args.only and (args.out / "text").exists():
        print(json.dumps({"text": measure_text(args.out / "text", args.count)}), flush=True)


if __name__ == "__main__":
    main()
