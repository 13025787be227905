"""Opens a recording as the settings say, and puts it between a run and what it asks."""

from __future__ import annotations

from collections.abc import Callable

from metis_fast.checkpoint.digest import files_digest
from metis_fast.config import Config, by_content
from metis_fast.errors import RecordingError
from metis_fast.recording.file import Recording
from metis_fast.recording.judge import RecordingJudge, ReplayingJudge, RunJudge
from metis_fast.recording.tools import RecordingToolbox, ReplayingToolbox
from metis_fast.tools.protocol import Toolbox


def open_recording(config: Config) -> Recording | None:
    """The file of `tools.record` or `tools.replay`; None where neither is set. Close it after toolbox and judge.

    Raises:
        RecordingError: it cannot be used, or it holds answers of other files: a corpus, a judge's prompt.
    """
    tools = config.tools
    path = tools.record or tools.replay
    if path is None:
        return None
    recording = Recording(path, writable=tools.record is not None)
    try:
        _check_files(config, recording)
    except BaseException:  # whatever it is, it goes on when this is closed
        recording.close()
        raise
    return recording


def _check_files(config: Config, recording: Recording) -> None:
    """Keys name no content of files, which a replay need not have; so a recording is of one set of them."""
    files = [(key, path) for key, path in by_content(config) if key.startswith(("tools.", "score."))]
    now = {f"digest of {key}": files_digest(path) for key, path in files if path is not None and path.exists()}
    for name, found in now.items():
        if recording.about(name) not in (None, found):
            raise RecordingError(
                f"{recording} holds answers of another {name.removeprefix('digest of ')} than the one that is there now; "
                "restore that, or record into a new file"
            )
    if recording.writable:
        recording.describe(now)


def recorded_toolbox(config: Config, recording: Recording | None, open: Callable[[], Toolbox]) -> Toolbox:
    """The run's toolbox. open: opens the tools; not called in a replay, which needs none of what they do.

    Raises:
        RecordingError: there is no recording of tools.
    """
    if recording is None:
        return open()
    if not recording.writable:
        return ReplayingToolbox(config.tools, recording)
    toolbox = open()
    try:
        return RecordingToolbox(toolbox, config.tools, recording)
    except BaseException:  # whatever it is, it goes on when this is closed
        toolbox.close()
        raise


def recorded_judge(config: Config, recording: Recording | None, open: Callable[[], RunJudge]) -> RunJudge:
    """The run's judge. open: as for `recorded_toolbox`."""
    if recording is None:
        return open()
    if not recording.writable:
        return ReplayingJudge(config.score, recording)
    return RecordingJudge(open(), config.score, recording)
