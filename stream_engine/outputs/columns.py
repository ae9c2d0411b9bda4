"""What a dataset's columns are and hold, for the card's table and its dataset_info."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_engine.outputs.formats.base import EXTRAS, DatasetFiles, ParquetFiles
from stream_engine.outputs.parquet import IMAGE

MEANINGS = {
    "image": "the picture, its encoded bytes inside",
    "images": "the pictures, their encoded bytes inside; empty for a question without any",
    "question": "the question, without a mark for the picture",
    "prompt": "the user's turn: texts, and a part `image` for each picture",
    "messages": "the user's turn, `<image>` where a picture stands, and the chosen answer",
    "conversations": "the user's turn, `<image>` where a picture stands",
    "answers": "every answer, best first (see below)",
    "completion": "the answer as the assistant's turn",
    "label": "whether the answer is one of the best of its question, or one of the worst",
    "model": "who wrote the answer, as the input said; empty: sampled by this run",
    "score": "score of the answer; higher is better",
    "rank": "its place among the answers to the question; 1 is the best, equal scores share it",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "rejected_response": "the worse answer",
    "logps": "log-probs of both answers under the instruct model, as JSON (see below)",
    "ds_name": "name of the input's dataset, where its rows said one",
    "origin_dataset": "likewise, of the dataset that it came from",
    "origin_split": "likewise, its split",
    "idx": "the question's id in the input; its key where there was none",
    "key": "hash of id, question and pictures, by which `stream-engine inspect` finds it",
    "image_path": "path of the picture as the input named it",
    "metainfos": "whatever else the input said, as JSON",
    "chosen_model": "who wrote the chosen answer, as the input said; empty: sampled by this run",
    "rejected_model": "likewise of the rejected answer",
    "chosen_score": "score of the chosen answer; higher is better",
    "rejected_score": "score of the rejected answer",
    "margin": "difference of the scores",
    "round": "which of the run's rounds, from 1: which instruct model answered",
}
JSONL_COLUMNS = {
    "ms_swift_jsonl": ("messages", "rejected_response"),
    "llama_factory_jsonl": ("conversations", "chosen", "rejected"),
}


def column_rows(export: type[DatasetFiles], format: str) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column."""
    if issubclass(export, ParquetFiles):
        types = {name: type_name(feature) for name, feature in export.features.items()}
        return [(f"`{name}`", kind, MEANINGS[name]) for name, kind in types.items()]
    names = (*JSONL_COLUMNS[format], *EXTRAS)
    rows = [(f"`{name}`", "JSON", MEANINGS[name]) for name in names]
    return [
        *rows,
        ("`images`", "JSON", "paths of the pictures in this folder, where there are any"),
    ]


def type_name(feature: Any) -> str:
    """A feature in a word or two."""
    if isinstance(feature, list):
        return f"list of {type_name(feature[0])}"
    if feature == IMAGE:
        return "image"
    if feature.get("_type") == "Value":
        return str(feature["dtype"])
    return f"{{{', '.join(feature)}}}"


def yaml_features(features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Features as a card's `dataset_info` writes them."""
    return [{"name": name, **yaml_feature(feature)} for name, feature in features.items()]


def yaml_feature(feature: Any) -> dict[str, Any]:
    """One of them without its name."""
    if isinstance(feature, list):
        inner = yaml_feature(feature[0])
        return {"list": inner.get("struct", inner.get("dtype", inner))}
    if feature == IMAGE:
        return {"dtype": "image"}
    if feature.get("_type") == "Value":
        return {"dtype": feature["dtype"]}
    return {"struct": yaml_features(feature)}
