"""The dataset card of answers: as card.py makes that of pairs, for the formats of RANKINGS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.config import RankingConfig, RunConfig, SamplingConfig
from stream_engine.outputs.card import (
    counts_of_answers,
    counts_of_samples,
    fenced,
    files_by_split,
    front_matter,
    how_it_was_made,
    shown_texts,
    table,
    two_columns,
)
from stream_engine.outputs.columns import column_rows
from stream_engine.outputs.formats.base import RankedRow, Ranking
from stream_engine.outputs.made_by import citation
from stream_engine.outputs.usage import usage
from stream_engine.text import printable

TAGS = ("rlaif", "image", "stream_engine")


def ranking_card(
    config: RunConfig,
    stats: Mapping[str, Any],
    *,
    ranking: type[Ranking],
    content: str,
    token: str,
    example: RankedRow | None = None,
    picture: str | None = None,
    resolved_sampling: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md; arguments as of `card.dataset_card`."""
    from huggingface_hub import DatasetCard

    title = config.pretty_name or "Ranked answers"
    sampling = {**msgspec.to_builtins(config.part(SamplingConfig)), **(resolved_sampling or {})}
    selection = {
        **msgspec.to_builtins(config.part(RankingConfig)),
        "best": config.best,
    }
    used = ("rank", "best", "similarity_threshold")
    sections = [
        front_matter(config, stats, ranking, content, token, tags=TAGS),
        f"# {printable(title)}\n\n"
        f"{sum(stats['splits'].values())} {ranking.holds}, scored by stream_engine's pipeline "
        f"`{stats['pipeline']}`.",
        example_of(example, picture),
        "## Columns\n\n"
        + table(("column", "type", "what it holds"), column_rows(ranking, stats["format"])),
        "## Use\n\n" + usage(stats["format"], files_by_split(stats["parts"])),
        how_it_was_made(config),
        two_columns("sampling", sampling),
        two_columns("selection", {name: selection[name] for name in used}),
        "## Counts",
        two_columns("count of", counts(stats)),
        "## Citation\n\n" + fenced(citation(stats["pipeline"]), "bibtex"),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return str(DatasetCard(text, ignore_metadata_errors=False))


def example_of(row: RankedRow | None, picture: str | None) -> str:
    """A question with its best and its worst answer."""
    scored = [one for one in row.answers if one.score is not None] if row else []
    if row is None or not scored:
        return ""
    texts = {"Question": row.sample.question}
    for name, one in (("Best", scored[0]), ("Worst", scored[-1]))[: len(scored)]:
        assert one.score is not None
        texts[f"{name} answer, of score {one.score.score:.4g}"] = one.answer.text
    return shown_texts(texts, picture)


def counts(stats: Mapping[str, Any]) -> dict[str, int]:
    """Where every sample and every answer went."""
    ranked = stats["ranked"]
    return {
        **counts_of_samples(stats["samples"]),
        "records refused at input": stats["samples"]["rejected"],
        **counts_of_answers(stats["answers"]),
        **{f"... dropped: {why}": n for why, n in ranked["dropped"].items()},
        "... written": ranked["written"],
        "rows": sum(stats["splits"].values()),
        **{f"... split {name}": n for name, n in stats["splits"].items()},
    }
