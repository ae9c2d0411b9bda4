"""verify-checkpoint: what it checks, and that a wrong checkpoint or dump does not pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from stream_engine.config import ModelConfig
from stream_engine.engine.verify_checkpoint import verify_checkpoint
from stream_engine.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "llava15"


def dump(path: Path, *, shift: float = 0.0, swap_ids: bool = False) -> Path:
    """A reference dump of what the original LLaVA-1.5 code computed (the golden arrays)."""
    from safetensors.numpy import load_file

    golden = load_file(GOLDEN / "golden.safetensors")
    about = json.loads((GOLDEN / "golden.json").read_text())
    ids = golden["prompt_ids/q0"].copy()
    if swap_ids:
        ids[[1, 2]] = ids[[2, 1]]
    labels = golden["score_labels/q0/a0"]
    tensors = {
        "0/image": np.array(Image.open(GOLDEN / "images" / "wide.png").convert("RGB")),
        "0/prompt_ids": ids,
        "0/answer_ids": labels[labels >= 0],
        "0/answer_logps": golden["score_pad/wide/q0/a0/token_logp"] + np.float32(shift),
    }
    cases = [{"question": about["questions"][0]["question"], "answer": ""}]
    meta = {"stream_engine_reference": json.dumps({"dtype": "float32", "cases": cases})}
    save_file(tensors, path, metadata=meta)
    return path


def checks(reference: Path | None = None) -> dict[str, bool | None]:
    report = verify_checkpoint(GOLDEN / "checkpoint", ModelConfig(), reference=reference)
    return {check.name: check.ok for check in report}


def test_a_good_checkpoint_passes_every_check(tmp_path):
    results = checks(dump(tmp_path / "dump.safetensors"))
    assert results["strict load"]
    assert results["tokenizer round trip"] is not None
    assert results["shared prefix"]
    assert results["image swap"]
    assert results["case 0: prompt ids"]
    assert results["case 0: log-probs"]


def test_other_log_probs_or_ids_do_not_pass(tmp_path):
    assert not checks(dump(tmp_path / "a.safetensors", shift=0.01))["case 0: log-probs"]
    assert not checks(dump(tmp_path / "b.safetensors", swap_ids=True))["case 0: prompt ids"]


def test_what_is_no_dump_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="dump_reference"):
        checks(tmp_path / "missing.safetensors")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        list(verify_checkpoint(tmp_path, ModelConfig()))


def test_the_command_prints_every_check_and_exits_2_when_one_fails(tmp_path, capsys):
    from stream_engine.cli.main import main

    folder = str(GOLDEN / "checkpoint")
    good = ["--reference", str(dump(tmp_path / "a.safetensors"))]
    assert main(["verify-checkpoint", folder, *good]) == 0
    assert "all checks passed" in capsys.readouterr().out
    bad = ["--reference", str(dump(tmp_path / "b.safetensors", shift=0.01))]
    assert main(["verify-checkpoint", folder, *bad]) == 2
    assert "FAILED  case 0: log-probs" in capsys.readouterr().out
