"""vLLM as a process of its own, in an environment of its own: draws and scores what it is told.

Started by with_vllm.py as `PYTHON vllm_process.py CHECKPOINT OPTIONS`, OPTIONS being a JSON object.
Reads one JSON object a line from standard input and answers with one a line on what was standard
output; all that vLLM prints goes to standard error. It imports nothing of this repository, because
the environment holds nothing of it.

    {"do": "load", "pictures": [path ...], "prompts": [[id ...] ...]}    the questions
    {"do": "draw", "k", "tokens", "questions"}      k answers to each of the first questions
    {"do": "score", "answers", "reads_cache"}       log-probs of answers to each of them

The seconds in the answers are those of vLLM alone: of the clock, and of the processor.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
BLOCK = 32
"""Tokens of a block of vLLM's cache: only whole blocks of a prompt are found again."""


def main() -> None:
    # Stopped between commands, it would not see that who asks has died.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    served = Served(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps(served.versions), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(served, command.pop("do"))(**command)
        print(json.dumps(result), file=answers, flush=True)


class Served:
    """A loaded model and the questions that it is asked."""

    def __init__(self, checkpoint: str, options: dict[str, Any]) -> None:
        import torch
        import transformers
        import vllm

        started = time.perf_counter()
        self.llm = vllm.LLM(
            model=checkpoint,
            max_model_len=1024,
            limit_mm_per_prompt={"image": 1},
            # Chunked prefill is for the latency of others; a prompt in one piece is faster here.
            enable_chunked_prefill=False,
            max_num_batched_tokens=32768,
            max_num_seqs=256,
            enable_prefix_caching=True,
            block_size=BLOCK,
            disable_log_stats=True,
            **options,
        )
        self.questions: list[dict[str, Any]] = []
        self.versions = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "load_seconds": round(time.perf_counter() - started, 1),
        }

    def load(self, pictures: list[str], prompts: list[list[int]]) -> dict[str, int]:
        from PIL import Image

        self.questions = [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.open(Path(path)).copy()}}
            for path, ids in zip(pictures, prompts)
        ]
        return {"questions": len(self.questions)}

    def draw(self, k: int, tokens: int, questions: int) -> dict[str, Any]:
        """k answers of `tokens` tokens to each of the first questions, and their log-probs.

        The cache is emptied before: a question's prompt runs once, for all its answers.
        """
        from vllm import SamplingParams

        settings = SamplingParams(
            n=k,
            temperature=0.7,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,  # of the drawn token alone, untempered
            detokenize=False,
            flat_logprobs=True,
        )
        self.llm.reset_prefix_cache()
        results, spent = self.run(self.questions[:questions], settings)
        rows = [row for result in results for row in result.outputs]
        return {
            **spent,
            "answers": [list(row.token_ids) for row in rows],
            "logps": [list(row.logprobs.logprobs) for row in rows],
        }

    def score(self, answers: list[list[list[int]]], reads_cache: bool) -> dict[str, Any]:
        """Log-probs of each question's answers.

        vLLM computes log-probs of a prompt without its prefix cache, unless it is told to read it:
        then those of cached positions are not there, which here are the question's, not wanted.
        """
        from vllm import SamplingParams

        settings = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True
        )
        if reads_cache:
            settings.skip_reading_prefix_cache = False
        self.llm.reset_prefix_cache()
        requests = [
            question | {"prompt_token_ids": question["prompt_token_ids"] + row}
            for question, rows in zip(self.questions, answers)
            for row in rows
        ]
        results, spent = self.run(requests, settings)
        lengths = [len(row) for rows in answers for row in rows]
        return {
            **spent,
            "logps": [
                list(result.prompt_logprobs.logprobs)[-length:]
                for result, length in zip(results, lengths)
            ],
        }

    def run(
        self, requests: list[dict[str, Any]], settings: Any
    ) -> tuple[list[Any], dict[str, float]]:
        wall, processor = time.perf_counter(), time.process_time()
        results = self.llm.generate(requests, settings, use_tqdm=False)
        spent = {
            "perf_counter": time.perf_counter() - wall,
            "process_time": time.process_time() - processor,
        }
        return results, spent


if __name__ == "__main__":
    main()
