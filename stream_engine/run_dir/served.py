"""What a run has had of models on servers, and what that costs, as its files tell."""

from __future__ import annotations

from collections import Counter

import msgspec

from stream_engine.errors import ConfigError
from stream_engine.run_dir.run_json import read_with_version
from stream_engine.run_dir.state import RunState
from stream_engine.servers import prices_of

MILLION = 1_000_000


class ServerUse(msgspec.Struct, frozen=True):
    """One role's model on a server. `cost` is None without --token_prices of the role.

    Counted are replies of shards that are written, or were lost to a later try of the same worker;
    not those of a worker that was killed.
    """

    model: str
    url: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def line(self, role: str) -> str:
        """For people."""
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        return (
            f"{role}: {self.model} at {self.url}, {self.requests} requests, "
            f"{self.prompt_tokens} prompt + {self.completion_tokens} completion tokens{cost}"
        )


def servers_of(state: RunState) -> dict[str, ServerUse]:
    """The models on servers that a run asked, by role; {} for a run without."""
    try:
        run_file, _ = read_with_version(state.run_dir)
    except ConfigError:
        run_file = None
    if run_file is None:
        return {}
    prices = prices_of(run_file.settings.get("token_prices", []))
    counts: dict[str, Counter[str]] = {}
    for header in state.headers():
        for role, used in header.created_by.get("servers", {}).items():
            counts.setdefault(role, Counter()).update(used)
    found = {}
    for role, said in sorted(run_file.engines.items()):
        if "server" not in said:
            continue
        used = counts.get(role, Counter())
        prompt, completion = used["prompt_tokens"], used["completion_tokens"]
        cost = None
        if role in prices:
            of_prompt, of_completion = prices[role]
            cost = (prompt * of_prompt + completion * of_completion) / MILLION
        found[role] = ServerUse(
            said["checkpoint"], said["server"], used["requests"], prompt, completion, cost
        )
    return found
