"""What `validate` says of an input."""

import base64
import json
from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs.validate import InputCheck
from tests.samples import input_config, picture


def test_bad_input_rows_are_named_with_file_row_and_reason(tmp_path: Path) -> None:
    image = base64.b64encode(picture(0)).decode()
    rows = [
        {"question": "What?", "question_id": "a", "image": image},
        {"question": "", "question_id": "b", "image": image},
        {"question": "What?", "question_id": "c", "image": "!!"},
        {"question": "What else?", "question_id": "a", "image": image},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n")
    check = InputCheck(str(path), input_config())
    problems = list(check.problems())
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{path}, row 1 (id b)",
        f"{path}, row 2 (id c)",
        f"{path}, row 3",
        f"{path}, row 4",
    ]
    assert "idx 'a' was given to another sample before" in problems[2]
    assert check.lines()[0] == "5 rows: 1 samples, 4 rejected"
    assert check.lines()[1] == "samples by number of pictures: 1 with 1"
    assert sum(line.startswith("empty_question: ") for line in check.lines()) == 1
    path.write_text(json.dumps(rows[0]) + "\n")
    assert list(InputCheck(str(path), input_config()).problems()) == []


def test_nothing_at_the_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        list(InputCheck(str(tmp_path / "nowhere"), input_config()).problems())
