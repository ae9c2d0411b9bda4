"""The prompts that the demo models are trained on: word for word those of the real checkpoints.

They are written out here, and not imported from the pipelines, because a checkpoint remembers the
words it was trained on: changing a pipeline's prompt must not silently change what these scripts
make. tests/demo holds the two together.
"""

YES_NO_PROMPT = "{} Please answer yes or no."

CRITIC_PROMPT = (
    "Given an image and a corresponding question, please serve as an unbiased and fair judge to "
    "evaluate the quality of the answers provided by a Large Multimodal Model (LMM). Determine "
    "which answer is better and explain your reasoning with specific details. Your task is "
    "provided as follows:\n"
    "Question: [{}]\nThe first response: [{}]\nThe second response: [{}]\nASSISTANT:\n"
)

SPLIT_PROMPT = (
    "You are an expert in extracting facts from the given question-answer pair for an image. Your "
    "task is to extract and rewrite the facts mentioned in the question-answer pair into "
    "self-contained sentences. Exclude opinions or subjective statements.\n\n"
    "You should present your result in the following format:\n"
    "### Facts:\n- {Extracted fact 1}\n- {Extracted fact 2}\n- ...\n\n"
    "### Question-answer pair:\nQuestion: "
)  # then the question, "\nAnswer: " and the answer

REWRITE_PROMPT = (
    "You are an expert at modifying a given declarative sentence into a general question sentence. "
    "Your task is to modify the given declarative sentences one by one into a general question "
    "form. Do not change tenses or add extra content.\n"
    "    If the given declarative sentence contains not, no or negative meaning words, you need to "
    "check the modified general interrogative sentence to make sure that the generated general "
    "question sentence retains words with not , no or negative meaning words.\n\n"
    "You should present your result in the following format:\n"
    "### Modified sentences:\n- {Modified sentence 1}\n- {Modified sentence 2}\n- ...\n\n"
    "### Declarative sentences:"
)  # then "\n- ", the fact and "\n", for each fact


def split_prompt(question: str, answer: str) -> str:
    content = f"{SPLIT_PROMPT}{question}\nAnswer: {answer}"
    return " ".join(content.split(" ")[:300])


def rewrite_prompt(facts: list[str]) -> str:
    return REWRITE_PROMPT + "".join(f"\n- {fact}\n" for fact in facts)
