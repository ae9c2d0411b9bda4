"""The reader of weight files: what it finds, what it fills, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models.checkpoints import empty_weights, load_into, resolve_device, resolve_dtype
from stream_engine.models.weight_files import LEGACY_BUFFERS, WeightFiles

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def write(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    """Files of one kind with these tensors, and an index where there are several."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)
    if len(files) > 1:
        stem = "model.safetensors" if name.endswith(".safetensors") else "pytorch_model.bin"
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files_are_found_and_read(tmp_path, suffix):
    first, second = torch.randn(3, 2), torch.arange(4)
    write(tmp_path, {f"a.{suffix}": {"x": first}, f"b.{suffix}": {"y": second}})
    weights = WeightFiles(tmp_path)
    assert sorted(weights.names) == ["x", "y"]
    assert weights.shape("x") == (3, 2)
    assert torch.equal(weights.get("x"), first)
    assert weights.unused() == ["y"]
    with pytest.raises(CheckpointError, match=r"b\.\w+ holds 1 unexpected tensor: y"):
        weights.check_all_used()
    assert torch.equal(weights.get("y"), second)
    weights.check_all_used()


def test_a_bin_in_the_old_container_is_read(tmp_path):
    tensors = {"x": torch.randn(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(WeightFiles(tmp_path).get("x"), tensors["x"])


def test_safetensors_win_over_a_bin(tmp_path):
    write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}})
    write(tmp_path, {"pytorch_model.bin": {"x": torch.zeros(1)}})
    assert WeightFiles(tmp_path).get("x") == 1


def test_constructors_run_without_memory_and_buffers_keep_their_values():
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=50,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    )
    with empty_weights():
        model = LlamaForCausalLM(config)
    plain = LlamaForCausalLM(config)
    assert model.lm_head.weight.is_meta
    buffers = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert torch.empty(2).device.type == "cpu"


class Tiny(nn.Module):
    """Two tied layers, a free one, a stored buffer and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("angles", torch.linspace(0, 1, 3), persistent=False)


def tiny_tensors() -> dict[str, torch.Tensor]:
    return {
        "t.embed.weight": torch.randn(5, 4),
        "t.norm.weight": torch.randn(4),
        "t.norm.bias": torch.randn(4),
        "t.count": torch.tensor([7]),
    }


def rename(name: str) -> str | None:
    return name.removeprefix("t.") if name.startswith("t.") else None


def load_tiny(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Tiny, WeightFiles]:
    weights = WeightFiles(write(folder, {"model.safetensors": tensors}))
    with empty_weights():
        module = Tiny()
    return load_into(module, weights, rename, device=CPU, dtype=torch.bfloat16), weights


def test_a_module_is_filled_in_the_wanted_type_and_stays_tied(tmp_path):
    tensors = tiny_tensors() | {"other.weight": torch.ones(2)}
    module, weights = load_tiny(tmp_path, tensors)
    assert torch.equal(module.embed.weight, tensors["t.embed.weight"].bfloat16())
    assert module.head.weight is module.embed.weight
    assert module.count.tolist() == [7]
    assert module.angles.dtype == torch.float32
    assert torch.equal(module.angles, torch.linspace(0, 1, 3))
    assert not module.training
    assert not module.embed.weight.requires_grad
    assert weights.unused() == ["other.weight"]


def test_a_tied_tensor_stored_twice_must_be_equal(tmp_path):
    tensors = tiny_tensors()
    module, _ = load_tiny(tmp_path, tensors | {"t.head.weight": tensors["t.embed.weight"].clone()})
    assert module.head.weight is module.embed.weight
    with pytest.raises(CheckpointError, match=r"t\.\w+\.weight differs .* tie_word_embeddings"):
        load_tiny(tmp_path, tensors | {"t.head.weight": torch.randn(5, 4)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t.norm.bias": None}, r"lacks 1 tensor of Tiny: norm\.bias"),
        ({"t.norm.bias": None, "t.count": None}, "lacks 2 tensors of Tiny: count, norm.bias"),
        (
            {"t.norm.bias": torch.ones(3)},
            r"t\.norm\.bias has shape \(3,\), config.json needs \(4,\)",
        ),
    ],
)
def test_missing_and_misshapen_tensors_are_named(tmp_path, change, says):
    tensors = {name: t for name, t in (tiny_tensors() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=says) as error:
        load_tiny(tmp_path, tensors)
    assert "\n" not in str(error.value)


def test_legacy_buffers_are_discarded_by_name(tmp_path):
    names = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_model.embeddings.position_ids",
        "model.inv_freq_scale",
    ]
    write(tmp_path, {"model.safetensors": {name: torch.ones(1) for name in names}})
    weights = WeightFiles(tmp_path)
    weights.discard(LEGACY_BUFFERS)
    assert weights.unused() == names[2:]


def test_auto_means_float32_on_the_cpu_and_the_stored_type_elsewhere(tmp_path, monkeypatch):
    tensors = {"x": torch.ones(9, dtype=torch.float16), "y": torch.ones(2)}
    weights = WeightFiles(write(tmp_path, {"model.safetensors": tensors}))
    assert resolve_dtype(ModelConfig(device="cpu"), {}, weights) == torch.float32
    elsewhere = ModelConfig(device="meta")
    assert resolve_device(elsewhere).type == "meta"
    assert resolve_dtype(elsewhere, {"torch_dtype": "bfloat16"}, weights) == torch.bfloat16
    assert resolve_dtype(elsewhere, {}, weights) == torch.float16
    chosen = ModelConfig(device="meta", dtype="float32")
    assert resolve_dtype(chosen, {"dtype": "bfloat16"}, weights) == torch.float32


PEAK = """
import sys, torch
from torch import nn
from stream_engine.models.checkpoints import empty_weights, load_into
from stream_engine.models.weight_files import WeightFiles

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(field))

with empty_weights():
    module = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(8)])
weights = WeightFiles(sys.argv[1])
torch.ones(8).half().float()
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
load_into(module, weights, lambda name: name, device=torch.device("cpu"), dtype=torch.bfloat16)
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peak_memory_is_the_model_and_at_most_one_file(tmp_path, suffix):
    """Four files of 32 MiB (8 layers in float32) into a model of 64 MiB in bfloat16."""
    files = {
        f"{shard}.{suffix}": {f"{2 * shard + i}.weight": torch.ones(2048, 2048) for i in range(2)}
        for shard in range(4)
    }
    write(tmp_path, files)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    file_bytes = 2 * 2048 * 2048 * 4
    model_bytes = 8 * 2048 * 2048 * 2
    assert int(run.stdout) < model_bytes + 1.2 * file_bytes
