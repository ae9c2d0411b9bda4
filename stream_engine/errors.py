"""Every error this package raises on purpose.

    StreamEngineError                  base; str(error) is one line that says what to change
    ├── ConfigError                    a setting, flag or path is wrong (exit status 1)
    │   ├── SettingsChangedError       settings differ from those that made the existing results
    │   └── NoPicturesError            no row of an input has a picture
    ├── MissingStageError              an earlier stage has not been run; says which command runs it
    ├── CheckpointError                a model directory cannot be loaded as it is
    ├── DeviceLostError                this process can compute no more; a new one may
    ├── ModelsFailedError              no record of a shard came through the models
    ├── ServerError                    a server that runs a model does not answer
    ├── ParallelError                  the ranks that share a model were lost or fell out of step
    ├── RecordError                    one record is bad: quarantined by reason, the rest goes on
    ├── ShardError                     one shard is bad: retried, then recorded as failed
    │   ├── ShardReadError             the tar is short, torn or does not match its checksum
    │   ├── LeaseLostError             another worker took the shard over
    │   │   └── ChangedError           another process wrote the file first; nothing was overwritten
    │   └── WorkerDiedError            the worker that held the shard ended without giving it back
    └── ConservationError              the counts of a merge do not add up; nothing is written

Errors of the outside world (OSError, PIL's, pyarrow's) are translated once, at the edge, with the
cause kept (`raise ShardReadError(...) from error`).
"""


class StreamEngineError(Exception):
    """Base of all errors of this package."""


class ConfigError(StreamEngineError):
    """A setting is wrong; the message names the value and the rule."""


class SettingsChangedError(ConfigError):
    """Settings differ from those that made the results already present."""


class RoundOverError(ConfigError):
    """The run has gone on to another round than was asked for."""


class NoPicturesError(ConfigError):
    """No row of an input, `source`, has a picture: most likely their column has another name."""

    def __init__(self, message: str, source: str) -> None:
        super().__init__(message)
        self.source = source


class MissingStageError(StreamEngineError):
    """An earlier stage has no complete results; the message says what to run."""


class CheckpointError(StreamEngineError):
    """A checkpoint cannot be loaded as it is; the message names the file or tensor."""


class DeviceLostError(StreamEngineError):
    """The device gives the same error to whatever this process asks of it; a new process may do."""


class ModelsFailedError(StreamEngineError):
    """Every record of a shard failed in the models: the models are at fault, not the records."""


class ServerError(StreamEngineError):
    """A server that runs a model answers nothing: it is at fault, not the records."""


class ParallelError(StreamEngineError):
    """Ranks that hold a model together cannot go on together; a rerun resumes."""


class RecordError(StreamEngineError):
    """One record is bad. `reason` is a short snake_case name that is counted and reported."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class ShardError(StreamEngineError):
    """One shard cannot be processed now."""


class ShardReadError(ShardError):
    """A shard's tar is unreadable or is not what the manifest says."""

    def __init__(self, path: object, detail: str, member: str = "") -> None:
        where = f"{path}, member {member}" if member else f"{path}"
        super().__init__(f"{where}: {detail}")
        self.path = str(path)
        self.member = member
        self.detail = detail


class LeaseLostError(ShardError):
    """The lease on a shard is no longer this worker's."""


class ChangedError(LeaseLostError):
    """A file is not what it was when it was read: another process wrote it, and nothing was done.

    `path` is the file's.
    """

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path}: another process has written it since this one read it; nothing was "
            "overwritten, and what is there stands. The same command goes on from there"
        )
        self.path = str(path)


class WorkerDiedError(ShardError):
    """The worker that held the shard was killed, crashed, or fell silent."""


class ConservationError(StreamEngineError):
    """Counts in and counts out differ; the message names both sides."""
