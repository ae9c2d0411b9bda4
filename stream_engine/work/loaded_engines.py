"""LoadedEngines: the models a worker has in memory, loaded when a shard first needs them.

A checkpoint is loaded once, whatever number of roles it has: roles that draw alike share an engine,
and engines of one checkpoint its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig, Stage
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank, set_device
from stream_engine.run_dir.engines import note_engines
from stream_engine.run_dir.paths import RunDir
from stream_engine.servers import ServedModel, ServerConfig, served

if TYPE_CHECKING:
    from stream_engine.engine import Engine
    from stream_engine.remote import ServerModel
    from stream_engine.work.team import Team

logger = logging.getLogger(__name__)


EngineKey = tuple[str, SamplingConfig | None]


def engine_key(role: ModelRole) -> EngineKey:
    """What two roles must have in common to share an engine. On servers each has its own: tokens
    are counted by role."""
    return (f"{role.name} {role.path}" if served(role.path) else role.path), role.sampling


class LoadedEngines:
    """Engines by role. Roles with one path and one way of sampling share one engine."""

    def __init__(
        self,
        run_dir: RunDir,
        pipeline: Pipeline,
        rank: Rank,
        team: Team | None = None,
        number: int | None = None,
    ) -> None:
        """`team` is given to the rank that leads one; `number` is the round that they work at."""
        self.run_dir = run_dir
        self.pipeline = pipeline
        self.rank = rank
        self.team = team
        self.number = number
        self._loaded: dict[EngineKey, Any] = {}  # Engine, or ServerModel
        self._unsaid: list[tuple[ModelRole, Any]] = []
        self._device = ""
        self.one_at_a_time = False

    def get(self, needed: Sequence[Stage], *, keep: Sequence[Stage]) -> Mapping[str, Engine]:
        """The engines of the `needed` stages by role; those of other stages than `keep` are freed.

        With `one_at_a_time` an engine is loaded when it is asked for, and the one before it freed.

        Raises:
            CheckpointError: when a model cannot be loaded.
        """
        if self.team is None:
            return self._get(needed, keep)
        load = functools.partial(self._get, needed, keep)
        return self.team.load(tuple(needed), tuple(keep), self.one_at_a_time, load)

    def _get(self, needed: Sequence[Stage], keep: Sequence[Stage]) -> Mapping[str, Engine]:
        roles = {role.name: role for role in self.pipeline.roles() if role.stage in needed}
        kept = {engine_key(role) for role in self.pipeline.roles() if role.stage in keep}
        if self.one_at_a_time:
            self.free(self._loaded.keys() - kept)
            return OneAtATime(self, roles)
        paths = {engine_key(role)[0] for role in roles.values()}
        self.free({key for key in self._loaded if key not in kept and key[0] not in paths})
        engines = {name: self.engine(role) for name, role in roles.items()}
        self.free(self._loaded.keys() - kept)  # what had weights that these have now
        self.plan()
        return engines

    def holds(self, needed: Sequence[Stage]) -> bool:
        """Whether every model of these stages is in memory."""
        roles = (role for role in self.pipeline.roles() if role.stage in needed)
        return all(engine_key(role) in self._loaded for role in roles)

    def engine(self, role: ModelRole) -> Engine:
        """A role's engine, loaded now unless it is in memory."""
        key = engine_key(role)
        if key not in self._loaded:
            address = served(role.path)
            load = self._load if address is None else functools.partial(self._ask, address)
            engine = self._loaded[key] = load(role)
            self._unsaid.append((role, engine))
        return self._loaded[key]

    def _load(self, role: ModelRole) -> Engine:
        from stream_engine.engine import load_engine

        config = self.pipeline.config
        self._device = self._device or set_device(self.rank, config.device)
        models = dataclasses.replace(config.part(ModelConfig), device=self._device)
        twin = next((e for (path, _), e in self._loaded.items() if path == role.path), None)
        model = None if twin is None else twin.model
        started = time.monotonic()
        engine = load_engine(role, models, config.part(SamplingConfig), model=model)
        if model is None:
            seconds = time.monotonic() - started
            logger.info("loaded %s from %s in %.1f s", role.name, role.path, seconds)
        else:
            logger.info("%s shares the weights of %s", role.name, role.path)
        return engine

    def _ask(self, address: ServedModel, role: ModelRole) -> ServerModel:
        from stream_engine.remote import ServerModel

        config = self.pipeline.config
        sampling = role.sampling or config.part(SamplingConfig)
        logger.info("%s is %s at %s", role.name, address.name, address.url)
        return ServerModel(role.name, address, sampling, config.part(ServerConfig))

    def plan(self) -> None:
        """Divide the memory that new engines have left, and note what they say of themselves.

        Raises:
            ConfigError: when one runs in another precision here than where it ran before.
        """
        if not self._unsaid:
            return
        on_servers = {engine_key(role) for role in self.pipeline.roles() if served(role.path)}
        if held := [engine for key, engine in self._loaded.items() if key not in on_servers]:
            from stream_engine.engine import share_device

            share_device(held)
        said = {
            role.name: {"stage": role.stage, **engine.describe()} for role, engine in self._unsaid
        }
        if self.rank.place == 0:
            note_engines(self.run_dir, said, worker=self.rank.worker_id, number=self.number)
        self._unsaid.clear()  # last: what could not be noted is noted at the next try

    def only(self, role: ModelRole) -> Engine:
        """A role's engine, its checkpoint alone in memory."""
        own = engine_key(role)
        self.free({key for key in self._loaded if key[0] != own[0]})
        engine = self.engine(role)
        self.free(self._loaded.keys() - {own})  # its weights stay
        self.plan()
        return engine

    def free(self, keys: Collection[EngineKey]) -> None:
        for key in keys:
            self._loaded.pop(key).close()

    def close(self) -> None:
        """Free every model."""
        while self._loaded:
            self._loaded.popitem()[1].close()


class OneAtATime(Mapping[str, "Engine"]):
    """Engines by role, of which the one asked for last is in memory and no other."""

    def __init__(self, engines: LoadedEngines, roles: Mapping[str, ModelRole]) -> None:
        self._engines = engines
        self._roles = roles

    def __getitem__(self, name: str) -> Engine:
        return self._engines.only(self._roles[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)
