"""What the engines of a run said of themselves, and that all workers have the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.errors import ConfigError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import RunFile, at_work, change, has_results


def note_engines(
    run_dir: RunDir,
    engines: Mapping[str, dict[str, Any]],
    *,
    worker: str,
    number: int | None = None,
) -> None:
    """Keep what the engines said of themselves: resolved sampling, family, dtype, device.

    `number` is the round that they are of; None: the one at hand.

    Raises:
        ConfigError: when one is on another kind of device, or in another precision, than where it
            made results before, or makes them now.
    """

    def noted(run_file: RunFile | None) -> RunFile:
        assert run_file is not None, "the run was opened before"
        place = -1 if number is None else number - 1
        rounds: list[Any] = run_file.every_round
        known = rounds[place].engines
        all_of_them = dict(known)
        for role, said in engines.items():
            before = known.get(role, said)
            if precision(said) != precision(before) and is_relied_on(run_dir, before, worker):
                raise ConfigError(
                    f"{role} would run here on {' in '.join(precision(said))}, but this run's "
                    f"{role} is on {' in '.join(precision(before))}, and log-probs of different "
                    "precisions do not compare: mend this machine's devices (is the GPU driver "
                    "loaded?) or leave it out; to change the whole run, give another --work_dir"
                )
            has_moved = said.get("server") != before.get("server")
            if role not in known or precision(said) != precision(before) or has_moved:
                all_of_them[role] = said
        rounds[place] = msgspec.structs.replace(rounds[place], engines=all_of_them)
        *earlier, at_hand = rounds
        return msgspec.structs.replace(at_hand, rounds=earlier)

    change(run_dir, noted)


def precision(said: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of device and the dtype that an engine said it has."""
    return str(said["device"]).partition(":")[0], str(said["dtype"])


def is_relied_on(run_dir: RunDir, noted: Mapping[str, Any], worker: str) -> bool:
    """Whether results exist that a noted engine made, or other workers are at some."""
    return has_results(run_dir, noted["stage"]) or any(at != worker for at in at_work(run_dir))
