"""The errors a user can cause. Each message says what was expected, what came, and what to do.

The command line turns every `MetisError` into one line on stderr and exit code 2; anything else is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations


def one_line(error: object) -> str:
    """The message of another library's error, or other text from outside, without line breaks."""
    return " ".join(str(error).split())


class MetisError(ValueError):
    """Base of all errors that a user can cause and mend."""


class ConfigError(MetisError):
    """A configuration value, key, file or combination that cannot work."""


class DataError(MetisError):
    """A data file, row or column that does not hold what the schema asks for."""


class ModelError(MetisError):
    """A model folder that is missing, incomplete, or not a Qwen3-VL."""


class ToolSetupError(MetisError):
    """A tool that cannot run on this machine as configured (no sandbox, no corpus, ...)."""


class JudgeError(MetisError):
    """A judge that is not reachable or not configured, found before any rollout depends on it."""


class RecordingError(MetisError):
    """A recording of tools and judges that cannot be read or written, or that lacks what a replay asks for."""


class CheckpointError(MetisError):
    """A checkpoint that is damaged, or that belongs to another run."""


class TrainerError(MetisError):
    """A trainer rank that died, hung or could not start; the last checkpoint is as it was."""


class NonFiniteError(MetisError):
    """A NaN or Inf in loss or gradients; the step was not applied and its rollouts were saved."""


class InfrastructureError(RuntimeError):
    """A failure of our own machinery inside one rollout (tool server gone, engine dead).

    Raised by tools and engines, retried by the episode, and recorded as `Outcome.INFRASTRUCTURE_ERROR`; it never becomes a
    reward.
    """


class EngineFailure(InfrastructureError):
    """An engine failed amid a message. What the rollout has so far is whole: another engine can go on from there."""


class EngineError(MetisError):
    """The engines of a run cannot start, agree with the trainer, or stay alive; the last whole step is on disk."""


class SyncError(EngineFailure):
    """A weight transfer that did not arrive as it was sent; the engine serves the version it had."""


class StagingError(SyncError):
    """A weight version that changed in shared memory after it was staged: no engine can take it any more, and only the trainer
    can give it once more."""


class Interrupted(Exception):
    """Somebody asked the run to stop (Ctrl-C, SIGTERM); the last whole step is on disk."""
