"""The prompts that judges and text models are asked with, word for word.

They are protocol constants: the published checkpoints were trained on them, down to the odd spaces.
Each comes from RLAIF-V's data engine, in the file named beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stream_engine.records import without_marks

# utils/llama3_8b_inference.py; for rlaifv_llama3_split_model
SPLIT = (
    "You are an expert in extracting facts from the given question-answer pair for an image. Your "
    "task is to extract and rewrite the facts mentioned in the question-answer pair into "
    "self-contained sentences. Exclude opinions or subjective statements.\n\n"
    "You should present your result in the following format:\n"
    "### Facts:\n- {Extracted fact 1}\n- {Extracted fact 2}\n- ...\n\n"
    "### Question-answer pair:\nQuestion: "
)

# utils/llama3_8b_inference.py; for rlaifv_llama3_changeq_model
REWRITE = (
    "You are an expert at modifying a given declarative sentence into a general question sentence. "
    "Your task is to modify the given declarative sentences one by one into a general question "
    "form. Do not change tenses or add extra content.\n"
    "    If the given declarative sentence contains not, no or negative meaning words, you need to "
    "check the modified general interrogative sentence to make sure that the generated general "
    "question sentence retains words with not , no or negative meaning words.\n\n"
    "You should present your result in the following format:\n"
    "### Modified sentences:\n- {Modified sentence 1}\n- {Modified sentence 2}\n- ...\n\n"
    "### Declarative sentences:"
)

# utils/llama3_8b_inference.py; for any VLM that can say yes and no
YES_NO = "{} Please answer yes or no."

# muffin/llava_critic_gen_data.py; for llava-critic-7b. Its "<image>\n" is the family's to add.
CRITIC = (
    "Given an image and a corresponding question, please serve as an unbiased and fair judge to "
    "evaluate the quality of the answers provided by a Large Multimodal Model (LMM). Determine "
    "which answer is better and explain your reasoning with specific details. Your task is "
    "provided as follows:\n"
    "Question: [{}]\nThe first response: [{}]\nThe second response: [{}]\nASSISTANT:\n"
)


def split_prompt(question: str, answer: str) -> str:
    """Ask for an answer's facts. RLAIF-V cut this at 300 words; nothing is cut here."""
    return f"{SPLIT}{without_marks(question)}\nAnswer: {answer}"


def rewrite_prompt(facts: Sequence[str]) -> str:
    """Ask for a yes/no question for each fact. RLAIF-V sets a blank line between two facts."""
    return REWRITE + "".join(f"\n- {fact}\n" for fact in facts)


def yes_no_prompt(question: str) -> str:
    """Ask a yes/no question about the image."""
    return YES_NO.format(question)


def critic_prompt(question: str, first: str, second: str) -> str:
    """Ask which of two answers about the image is better."""
    return CRITIC.format(without_marks(question), first, second)
