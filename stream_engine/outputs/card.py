"""The dataset card: README.md beside the parts, for people and for `datasets.load_dataset`.

Everything in it comes from the settings, from stats.json and from the parts, so that equal datasets
have equal cards. It names no folder of the machine that made it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from stream_engine import DISTRIBUTION, __version__
from stream_engine.config import ModelConfig, OutputConfig, RankingConfig, RunConfig, SamplingConfig
from stream_engine.outputs.columns import column_rows, yaml_features
from stream_engine.outputs.formats.base import (
    SPLITS,
    DatasetFiles,
    PairRow,
    ParquetFiles,
    split_named,
)
from stream_engine.outputs.made_by import citation, command_line, model_name
from stream_engine.outputs.publication import with_token
from stream_engine.outputs.usage import usage
from stream_engine.text import printable

if TYPE_CHECKING:
    from stream_engine.records import Sample

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
TAGS = ("dpo", "rlaif", "preference", "image", "stream_engine")
EXAMPLE = "assets/example.jpg"
EXAMPLE_SIDE = 512  # pixels of the example's longer side at most
EXAMPLE_TEXT = 2000  # characters of each text of the example


def dataset_card(
    config: RunConfig,
    stats: Mapping[str, Any],
    *,
    export: type[DatasetFiles],
    content: str,
    token: str,
    example: PairRow | None = None,
    picture: str | None = None,
    resolved_sampling: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md.

    Args:
        stats: the content of stats.json.
        export: the format's class.
        content: the hash of the files that hold rows, from `published.content_hash`.
        token: what ends their names.
        example: a pair to show, and `picture` its picture's file in the folder.
        resolved_sampling: the sampling values that the engine used, where they are known.
    """
    from huggingface_hub import DatasetCard

    title = config.pretty_name or "Preference pairs"
    sampling = {**msgspec.to_builtins(config.part(SamplingConfig)), **(resolved_sampling or {})}
    sections = [
        front_matter(config, stats, export, content, token, tags=TAGS),
        f"# {printable(title)}\n\n"
        f"{stats['pairs']['written']} pairs (question, images, chosen and rejected answer) made "
        f"by stream_engine's pipeline `{stats['pipeline']}` for direct preference "
        "optimization (DPO) of a vision-language model.",
        example_section(example, picture),
        "## Columns\n\n"
        + table(("column", "type", "what it holds"), column_rows(export, stats["format"])),
        "## Use\n\n" + usage(stats["format"], files_by_split(stats["parts"])),
        how_it_was_made(config, format=stats["format"]),
        rounds_table(stats),
        two_columns("sampling", sampling),
        two_columns("selection", msgspec.to_builtins(config.part(RankingConfig))),
        "## Counts",
        counts(stats),
        "## Bias\n\n" + bias(stats),
        "## Citation\n\n" + fenced(citation(stats["pipeline"]), "bibtex"),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return str(DatasetCard(text, ignore_metadata_errors=False))


def how_it_was_made(config: RunConfig, *, format: str | None = None) -> str:
    """The command and the models. `format` is the dataset's own, whichever others are made beside
    it; None for one that no run writes."""
    models = msgspec.to_builtins(config.part(ModelConfig))
    paths = {"sampler": config.sampler} | {n: p for n, p in models.items() if "model_path" in n}
    named = {name: model_name(path) for name, path in paths.items() if path}
    formats = OutputConfig().format if format is None else (format,)
    command = command_line(replace(config, format=formats))
    return (
        f"## How it was made\n\nBy {DISTRIBUTION} {__version__}:\n\n"
        f"{fenced(command, 'bash')}\n\n" + two_columns("model", named)
    ).rstrip()


def rounds_table(stats: Mapping[str, Any]) -> str:
    """Which model answered in each round; empty where there is one."""
    rounds = stats.get("rounds", [])
    if len(rounds) < 2 and all(one["round"] == 1 for one in rounds):
        return ""
    rows = [
        (one["round"], one["instruct_model"] or "-", one["samples"], one["pairs"]) for one in rounds
    ]
    said = "What stands above and below are the settings of the last round. " * (len(rounds) > 1)
    return f"{said}The column `round` tells which instruct model answered:\n\n" + table(
        ("round", "instruct model", "questions", "pairs"), rows
    )


def front_matter(
    config: RunConfig,
    stats: Mapping[str, Any],
    export: type[DatasetFiles],
    content: str,
    token: str,
    *,
    tags: Sequence[str],
) -> str:
    """What the Hub and `load_dataset` read, as YAML between its marks.

    `load_dataset` caches a dataset under a hash of these lines, and sees of the files no more than
    the pattern: the description is what tells the datasets of two runs apart there.
    """
    from huggingface_hub import DatasetCardData

    num_rows = sum(stats["splits"].values())
    files = files_by_split(stats["parts"])
    data_files = [
        {"split": split, "path": with_token(export.data_files.format(split=split), token)}
        for split in files
    ]
    own = ["trl"] if stats["format"].startswith("trl") else []
    output = config.part(OutputConfig)
    data = DatasetCardData(
        license=output.license,
        language=list(output.language) or None,
        pretty_name=output.pretty_name or None,
        size_categories=[next((n for limit, n in SIZES.items() if num_rows < limit), "n>1M")],
        task_categories=["image-text-to-text", "visual-question-answering"],
        tags=[*own, *tags],
        configs=[
            {
                "config_name": "default",
                "description": f"content {content}",
                "data_files": data_files,
            }
        ],
        dataset_info=dataset_info(stats, export),
    )
    return f"---\n{data.to_yaml()}\n---"


def dataset_info(stats: Mapping[str, Any], export: type[DatasetFiles]) -> dict[str, Any] | None:
    """Features and sizes of a parquet dataset; JSON lines are typed as they are read."""
    if not issubclass(export, ParquetFiles):
        return None
    splits = [
        {
            "name": split,
            "num_bytes": sum(part["bytes"] for part in parts),
            "num_examples": sum(part["rows"] for part in parts),
        }
        for split in SPLITS
        if (parts := [p for p in stats["parts"] if split_named(p["name"]) == split])
    ]
    num_bytes = sum(split["num_bytes"] for split in splits)
    return {
        "features": yaml_features(export.features),
        "splits": splits,
        "download_size": num_bytes,
        "dataset_size": num_bytes,
    }


def files_by_split(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The names of the files that hold rows."""
    names = [part["name"] for part in parts]
    found = {split: [n for n in names if split_named(n) == split] for split in SPLITS}
    return {split: files for split, files in found.items() if files}


def write_example(folder: Path, sample: Sample | None) -> str | None:
    """Write the example's first picture, made small, into a dataset's folder; returns its name."""
    if sample is None or not sample.images:
        return None
    from stream_engine.errors import RecordError
    from stream_engine.pictures import decode_image

    image = sample.images[0]
    try:
        decoded = decode_image(image.data, image.path)
    except RecordError:  # the card is no place to fail for it
        return None
    decoded.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    buffer = io.BytesIO()
    decoded.convert("RGB").save(buffer, "JPEG", quality=90)
    path = folder / EXAMPLE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return EXAMPLE


def example_section(example: PairRow | None, picture: str | None) -> str:
    """One pair as a person reads it; foreign text stands in blocks that nothing in it can end."""
    if example is None:
        return ""
    texts = {
        "Question": example.sample.question,
        "Chosen": example.chosen.text,
        "Rejected": example.rejected.text,
    }
    scores = (
        f"Scores: {example.pair.chosen_score:.4g} (chosen), "
        f"{example.pair.rejected_score:.4g} (rejected)."
    )
    return shown_texts(texts, picture) + f"\n\n{scores}"


def shown_texts(texts: Mapping[str, str], picture: str | None) -> str:
    """The section of an example, its texts by what they are."""
    lines = ["## Example"]
    if picture:
        lines.append(f"![the example's picture]({picture})")
    for name, text in texts.items():
        shown = "\n".join(printable(line) for line in text[:EXAMPLE_TEXT].split("\n"))
        lines.append(f"{name}:\n\n{fenced(shown, 'text')}")
    return "\n\n".join(lines)


def fenced(text: str, language: str) -> str:
    """Text as a block of code, whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def counts(stats: Mapping[str, Any]) -> str:
    """Where every sample and every candidate pair went."""
    samples, pairs, answers = stats["samples"], stats["pairs"], stats["answers"]
    rows = {
        **counts_of_samples(samples),
        "... with candidate pairs": samples["with_candidates"],
        "... with pairs in this dataset": samples["with_pairs"],
        "records refused at input": samples["rejected"],
        **counts_of_answers(answers),
        **{f"pairs of the input: {why}": n for why, n in stats["given_pairs"].items()},
        "candidate pairs": pairs["candidates"],
        **{f"... dropped: {why}": n for why, n in pairs["dropped"].items()},
        "... written": pairs["written"],
        **{f"... ... split {name}": n for name, n in stats["splits"].items()},
    }
    return two_columns("count of", rows)


def counts_of_samples(samples: Mapping[str, Any]) -> dict[str, int]:
    """Where every sample went."""
    return {
        "samples": samples["total"],
        **{
            f"... with {k} picture{'' if k == '1' else 's'}": count
            for k, count in samples.get("with_images", {}).items()
        },
        "... scored": samples["scored"],
        **{f"... set aside ({stage})": n for stage, n in samples["quarantined"].items()},
        "... in shards without results": samples["missing"],
    }


def counts_of_answers(answers: Mapping[str, Any]) -> dict[str, int]:
    """Where every answer of the scored samples comes from, and how it ended."""
    brought = answers["ids_from_text"]
    return {
        "answers": answers["total"],
        **({"... brought along, with ids made from their texts": brought} if brought else {}),
        **{f"... by {printable(model)}": n for model, n in answers["models"].items()},
        **{f"... finished by {why}": n for why, n in answers["finish_reasons"].items()},
        **{f"... not scored ({why})": n for why, n in answers["unscored"].items()},
    }


def bias(stats: Mapping[str, Any]) -> str:
    """What a trainer may learn besides quality."""
    words, margin = stats["words"], stats["margin"]
    before, after = stats["length_wins_before_balance"], stats["length_wins"]
    rows: dict[str, Any] = {
        "mean words chosen": words["chosen"]["mean"],
        "mean words rejected": words["rejected"]["mean"],
        "longer answer chosen, of pairs of unequal length": after["rate"],
        "... before length balance": before["rate"],
        "mean margin of the scores": margin["mean"],
        "cut-off answers among the chosen": stats["pair_finish_reasons"].get("chosen_length", 0),
        "cut-off answers among the rejected": stats["pair_finish_reasons"].get(
            "rejected_length", 0
        ),
        **{f"judge: {name}": rate for name, rate in stats["judge"]["rates"].items()},
        **{f"judge: {name}": count for name, count in stats["judge"]["counts"].items()},
    }
    return (
        "Judges favour longer answers; half of the pairs of unequal length should be won by the "
        "longer one.\n\n" + two_columns("measure", rows)
    )


def two_columns(heading: str, rows: Mapping[str, Any]) -> str:
    """A Markdown table of names and values; empty when there are no rows."""
    return table((heading, ""), list(rows.items())) if rows else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    lines += [f"| {' | '.join(map(shown, row))} |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as a table cell."""
    if value is None:
        return "-"
    return str(value).replace("|", "\\|").replace("\n", " ")
