"""Trajectories of the scripted policy, for a cold start."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from metis_fast.config import Config
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.demo.policy import ScriptedEngine, ScriptStyle
from metis_fast.model_folder import check_model_folder, load_processor, load_tokenizer
from metis_fast.own_folder import OwnFolder
from metis_fast.pictures import ImagePreparer
from metis_fast.recording.opening import open_recording, recorded_toolbox
from metis_fast.report.progress import progress
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import collect
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.protocols import open_dialect
from metis_fast.rollout.store import RolloutStore
from metis_fast.run.interrupt import Interrupts
from metis_fast.tools import open_toolbox
from metis_fast.types import Score, ScoredGroup

_PART = 500  # prompts in one stored part; a part is played again if it was interrupted


def play(config: Config, prompts: Path, style: ScriptStyle, out: Path) -> int:
    """Let the script play every prompt of a file with the real tools; store the trajectories in `out`.

    Continues where an interrupted call stopped. Returns the number of trajectories.
    """
    check_model_folder(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    images = ImagePreparer(load_processor(config.model.path))
    files = PromptFiles([prompts])
    cursor = prompt_cursor(files, config.run.seed, shuffle=False, check=images.broken)
    store, rollout = RolloutStore(out), config.rollout.model_copy(update={"deterministic": False})
    with Interrupts() as interrupts, ExitStack() as stack:
        scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
        stack.callback(scratch.close)
        recording = open_recording(config)
        if recording is not None:
            stack.callback(recording.close)
        toolbox = recorded_toolbox(config, recording, lambda: open_toolbox(config.tools, scratch.path))
        stack.callback(toolbox.close)
        chat = Chat(tokenizer, images, open_dialect(config), Offer(config.tools, toolbox.tools))
        bar = stack.enter_context(progress(len(files), f"playing {prompts.stem}", config.log, "trajectory"))
        for start in range(0, len(files), _PART):
            part = cursor.next(min(_PART, len(files) - start))
            name = f"part-{start // _PART:04d}"
            if (out / f"{name}.parquet").exists():
                bar.update(len(part))
                continue
            engine = ScriptedEngine(tokenizer, part, style, config.run.seed * 1_000_003 + start)
            groups = interrupts.run(
                collect(part, 1, chat, engine, toolbox, rollout, config.run.seed, f"{prompts.stem}/{start}", bar.update)
            )
            store.write(
                name, [ScoredGroup(g.prompt, g.rollouts, tuple(Score(None, r.outcome) for r in g.rollouts)) for g in groups]
            )
    return len(files)
