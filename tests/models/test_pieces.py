"""Single tokens as text: put together they are what the model's own tokenizer decodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stream_engine.demo import checkpoint_path
from stream_engine.errors import CheckpointError
from stream_engine.models.pieces import load_pieces
from tests.conftest import ROOT

GOLDEN = ROOT / "tests/data/golden"
TEXT = "A blue circle, naïve café — 漢字 and 🙂 emoji.\nTwo  spaces."


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(checkpoint_path("instruct"), id="sentencepiece"),
        pytest.param(checkpoint_path("text"), id="demo-tokenizer-json"),
        pytest.param(GOLDEN / "llava_critic", id="byte-level"),
        pytest.param(GOLDEN / "minicpmv25", id="llama-3"),
    ],
)
def test_the_pieces_put_together_are_the_text(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    expected = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    pieces = load_pieces(checkpoint)(ids)
    assert len(pieces) == len(ids) > 5
    assert "".join(pieces).strip() == expected.strip()


def test_the_end_token_is_shown_by_its_name() -> None:
    load = load_pieces(checkpoint_path("instruct"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("instruct"))
    ids = [*tokenizer("red circle", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert load(ids)[-1] == "</s>"
    assert "".join(load(ids)[:-1]) == "red circle"


def test_a_vocabulary_of_bytes_without_tokenizer_json_is_read(tmp_path: Path) -> None:
    source = GOLDEN / "llava_critic"
    for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    ids = AutoTokenizer.from_pretrained(source)(TEXT).input_ids
    assert load_pieces(tmp_path)(ids) == load_pieces(source)(ids)


@pytest.mark.parametrize("content", [None, "", "{}", "no JSON"])
def test_what_is_no_tokenizer_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        load_pieces(tmp_path)


def test_no_torch_is_imported() -> None:
    code = f"""
import sys
from pathlib import Path
from stream_engine.models.pieces import load_pieces
load_pieces(Path({str(checkpoint_path("instruct"))!r}))([5, 6])
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
