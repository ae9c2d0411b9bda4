"""The rounds of a run as a merge tells of them: each one's settings, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stream_engine.config import RunConfig
from stream_engine.outputs.made_by import model_name
from stream_engine.pairs.merge_inputs import MergeInputs
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import config_of_round
from stream_engine.run_dir.run_json import read_run_file


def configs_of_rounds(
    run_dir: RunDir, config: RunConfig, inputs: MergeInputs
) -> dict[int, RunConfig]:
    """The settings of each round, by its number."""
    at_hand = inputs.fingerprints.at_hand
    rounds = read_run_file(run_dir).rounds if at_hand > 1 else []
    return {n: config_of_round(rounds, n, config) for n in range(1, at_hand + 1)}


def datasets_of(
    run_dir: RunDir, configs: Mapping[int, RunConfig], inputs: MergeInputs
) -> Iterator[tuple[MergeInputs, RunDir]]:
    """What each dataset of a run is made from and where it belongs: of every round that has shards,
    where there may be several, and of all of them."""
    if len(configs) > 1 or configs[len(configs)].questions is not None:
        for number in configs:
            if (of_round := inputs.of_round(number)).num_shards:
                yield of_round, run_dir.of_round(number)
    yield inputs, run_dir


def told_of_rounds(configs: Mapping[int, RunConfig], inputs: MergeInputs) -> list[dict[str, Any]]:
    """What a dataset says of each round whose pairs it has, but for how many those are."""
    told = []
    for number, config in configs.items():
        if inputs.number in (None, number):
            path = config.sampler or config.instruct_model_path
            of_round = inputs if inputs.number else inputs.of_round(number)
            samples = of_round.samples
            told.append(
                {
                    "round": number,
                    "instruct_model": model_name(path) if path else "",
                    "samples": samples["total"],
                    "scored": samples["scored"],
                    "rejected": samples["rejected"],
                }
            )
    return told
