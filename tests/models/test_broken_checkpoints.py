"""Broken checkpoints: each is refused in one line that names the file or tensor and the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models import load_model
from tests.models import writers_llava as writers

CPU = ModelConfig(device="cpu")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


class Payload:
    """What an attacker would put beside the tensors; unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the file that holds the last norm; the index follows."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][NORM]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    kept = {n: f for n, f in index["weight_map"].items() if f != path.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(folder: Path) -> str:
    edit(folder, lambda tensors: tensors.pop(NORM))
    return r"m lacks 1 tensor of LlamaForCausalLM: model\.norm\.weight"


def extra_tensor(folder: Path) -> str:
    edit(folder, lambda tensors: tensors.update({"model.layers.9.x": torch.ones(1)}))
    return r"\.safetensors holds 1 unexpected tensor: model\.layers\.9\.x"


def wrong_shape(folder: Path) -> str:
    edit(folder, lambda tensors: tensors.update({NORM: torch.ones(47)}))
    return r"\.safetensors: model\.norm\.weight has shape \(47,\), config\.json needs \(48,\)"


def untied_without_a_head(folder: Path) -> str:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index.pop("lm_head.weight")
    tensors = load_file(path)
    drop(tensors)
    save_file(tensors, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return r"lacks .* lm_head\.weight; config\.json says tie_word_embeddings is false"


def tied_with_another_head(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return r"differs from the tensor it is tied to; config\.json says tie_word_embeddings is true"


def lora_adapter(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    return r"m holds a LoRA adapter \(adapter_config\.json\), which is not applied; merge it"


def lora_adapter_beside_weights(folder: Path) -> str:
    """It was ignored: the base model answered in the adapted one's name."""
    (folder / "adapter_config.json").write_text("{}")
    return r"m holds a LoRA adapter \(adapter_config\.json\), which is not applied; merge it"


def quantised(folder: Path) -> str:
    """The packed tensors were called misshapen, as if config.json were another model's."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    changed = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(changed))
    packed = torch.zeros(24, 1, dtype=torch.uint8)
    edit(folder, lambda tensors: tensors.update({NORM: packed}))
    return r"config\.json: the weights are quantised \(quant_method bitsandbytes\).* unquantised"


def half_a_shard(folder: Path) -> str:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return f"{SECOND} is truncated or not a safetensors file"


def half_a_header(folder: Path) -> str:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:40])
    return f"{SECOND} is truncated or not a safetensors file"


def missing_shard(folder: Path) -> str:
    (folder / SECOND).unlink()
    return rf"index\.json names 2 files, of which {SECOND} is missing"


def stale_index(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"][NORM]
    index["weight_map"][NORM] = FIRST if index["weight_map"][NORM] == SECOND else SECOND
    path.write_text(json.dumps(index))
    return r"\.safetensors lacks .*, which the index places there"


def broken_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return r"index\.json is not JSON"


def no_weights(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    return "m has no weights: none of model.safetensors.index.json, "


def pickle_payload(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    payload = {"x": torch.ones(1), "y": Payload(folder / "touched")}
    torch.save(payload, folder / "pytorch_model.bin")
    return r"pytorch_model\.bin holds pickled Python objects beside tensors"


def half_a_bin(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"x": torch.ones(4096)}, path)
    path.write_bytes(path.read_bytes()[:9000])
    return r"pytorch_model\.bin is truncated"


def not_a_table(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"state_dict": {"x": torch.ones(1)}}, folder / "pytorch_model.bin")
    return r"pytorch_model\.bin does not hold a plain table of tensors"


def no_tower(folder: Path) -> str:
    for path in sorted((folder / "openai").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return r"m holds no vision tower; download openai/clip-vit.* --vision_tower_path"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.model").unlink()
    return r"m has no tokenizer\.model"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return r"m has no config\.json"


def shards_without_their_index(folder: Path) -> str:
    (folder / INDEX).unlink()
    return rf"is there, but {FIRST}, {SECOND}; download model\.safetensors\.index\.json too"


def another_programs_weights(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.gguf").touch()
    return r"is there, but model\.gguf; give the folder that transformers loads"


def folder_of_a_training_run(folder: Path) -> str:
    shutil.copytree(folder, folder / "checkpoint-500")
    for path in folder.glob("*.*"):
        path.unlink()
    return r"m has no config\.json; .*, here one of checkpoint-500$"


def folder_of_the_hubs_cache(folder: Path) -> str:
    shutil.copytree(folder, folder / "snapshots/0123")
    for path in folder.glob("*.*"):
        path.unlink()
    return r"m has no config\.json; .*, here one of snapshots/0123$"


def no_architectures(folder: Path) -> str:
    state(folder, architectures=None)
    return r"config\.json names no architectures"


def layers_of_no_number(folder: Path) -> str:
    state(folder, num_hidden_layers=None)
    return r"cannot load .*m: .*'num_hidden_layers' expected int"


def no_heads(folder: Path) -> str:
    state(folder, num_attention_heads=0)
    return r"cannot load .*m: ZeroDivisionError"


def unknown_activation(folder: Path) -> str:
    state(folder, hidden_act="nope")
    return r"cannot load .*m: KeyError: 'nope'"


def quantised_as_a_word(folder: Path) -> str:
    state(folder, quantization_config="awq")
    return r"config\.json: the weights are quantised \(quant_method awq\)"


def whole_numbers(folder: Path) -> str:
    """They were taken for the weights."""
    edit(folder, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int8)}))
    return r"model\.norm\.weight holds torch\.int8: the weights are quantised"


def state(folder: Path, **fields: object) -> None:
    """Rewrite config.json with these fields."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BREAKS = [
    shards_without_their_index,
    another_programs_weights,
    folder_of_a_training_run,
    folder_of_the_hubs_cache,
    no_architectures,
    layers_of_no_number,
    no_heads,
    unknown_activation,
    quantised_as_a_word,
    whole_numbers,
    missing_tensor,
    extra_tensor,
    wrong_shape,
    untied_without_a_head,
    tied_with_another_head,
    lora_adapter,
    lora_adapter_beside_weights,
    quantised,
    half_a_shard,
    half_a_header,
    missing_shard,
    stale_index,
    broken_index,
    no_weights,
    pickle_payload,
    half_a_bin,
    not_a_table,
    no_tower,
    no_tokenizer,
    no_config,
]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, break_it):
    folder = writers.write_original(tmp_path / "m", writers.random_weights(writers.Shape()))
    load_model(folder, CPU)
    says = break_it(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        load_model(folder, CPU)
    assert "\n" not in str(error.value)
    assert not (folder / "touched").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BROKEN_FILES = {
    "pointer": (POINTER.encode(), "is a Git LFS pointer, .* run `git lfs pull`"),
    "empty": (b"", "is empty; download it again"),
    "zeros": (bytes(1000), "holds zeros"),
}
BROKEN_OBJECTS = {
    "null": b"null",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 100_000,
    "cut": b'{"a": 1',
}


@pytest.mark.parametrize("name", [FIRST, "tokenizer.model", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_a_file_that_is_not_what_its_name_says_is_named_with_the_remedy(
    tmp_path: Path, name: str, fault: str
) -> None:
    folder = writers.write_original(tmp_path / "m", writers.random_weights(writers.Shape()))
    content, words = BROKEN_FILES[fault]
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {words}"):
        load_model(folder, CPU)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("fault", BROKEN_OBJECTS)
def test_json_of_another_kind_is_named_with_the_remedy(
    tmp_path: Path, name: str, fault: str
) -> None:
    folder = writers.write_original(tmp_path / "m", writers.random_weights(writers.Shape()))
    (folder / name).write_bytes(BROKEN_OBJECTS[fault])
    with pytest.raises(CheckpointError, match=rf"{name} (does not hold a|is not) JSON"):
        load_model(folder, CPU)
