"""What helps against each kind of reject, said once a kind and not once a row."""

from __future__ import annotations

from collections.abc import Iterable

REMEDIES = {
    "no_image": "name your picture column by --columns image=NAME, or give --text_only allow",
    "image_mark_mismatch": "write one <image> for each picture, or none: pictures then come first",
    "missing_question": "name your question column by --columns question=NAME",
    "empty_question": "give the rows a question, or leave them out",
    "invalid_question": "questions are text; name their column by --columns question=NAME",
    "invalid_text": "store texts as UTF-8",
    "malformed_json": "one JSON object a line (.jsonl), or one list of objects (.json)",
    "nested_too_deep": "flatten the lists and objects that the row holds in each other",
    "doubled_column": "give each column a name of its own",
    "two_pictures": "keep one of the columns, or name the right one by --columns images=NAME",
    "malformed_csv": "quote cells that hold the delimiter, line ends or quotes; double the quotes",
    "missing_image_file": "give --image_root, the folder that the paths start from",
    "unreachable_image": "`stream-engine retry-failed` reads the input again",
    "path_outside_root": "put the pictures below --image_root, or give --follow_links for links",
    "remote_image": "download the pictures first (img2dataset does) and give their paths",
    "unknown_image_form": "a picture is bytes, base64, a path, or a dict with one of these",
    "bad_base64": "encode the pictures again, or give paths",
    "undecodable_image": "convert the pictures to JPEG or PNG, or fetch them again",
    "truncated_image": "fetch the pictures again: their files end too early",
    "damaged_image": "fetch the pictures again: their data are broken in the middle",
    "image_too_large": "shrink the pictures, or raise --max_image_pixels",
    "image_too_long": "crop or shrink the pictures",
    "unsupported_pixel_depth": "scale the pictures to 8 bits",
    "turns_before_question": "leave system prompts out; questions are asked alone",
    "unknown_turns": "a turn is {from, value} or {role, content}",
    "unsupported_content": "a turn holds text and pictures only",
    "unread_member": "put a sample's picture beside its text, as a file, under the same name",
    "scattered_members": "sort the tar's members by name (tar --sort=name)",
    "damaged_header": "make the tar again",
    "conflicting_id": "make the ids unique, or leave them out: they are then made from the content",
    "changed_row": "give an edited row another id, or read all in a new work_dir",
    "unreadable_file": "fetch the file again; the next run reads it",
    "unreadable_row_group": "write the parquet file again",
    "control_token": "take the model's control tokens out of question and answers",
    "no_answers": "write null, or no column, where answers are to be sampled",
    "too_many_answers": "leave some out, or give the question twice with a part of them each",
    "invalid_answers": "`answers` is a list; --given_answers ignore samples answers in their place",
    "invalid_answer": "an answer is text, or {text, model, finish_reason}; --given_answers ignore "
    "samples answers in their place",
    "incomplete_pair": "give both chosen and rejected, or leave --given_answers pairs out",
    "different_questions": "both conversations of a pair begin with the same question",
    "too_many_images": "choose a model that takes as many pictures",
    "prompt_too_long": "shorten the question, or an answer that came with it, or choose a model "
    "with a longer context",
}
"""reason -> what its user can do."""


def remedy_lines(reasons: Iterable[str]) -> list[str]:
    """One line for each kind that has a remedy, in order."""
    known = (reason for reason in dict.fromkeys(reasons) if reason in REMEDIES)
    return [f"{reason}: {REMEDIES[reason]}" for reason in known]
