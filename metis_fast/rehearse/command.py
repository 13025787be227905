"""The command `metis-fast rehearse`: the path of a config, on stand-ins, stage by stage, with a table of them in the end."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from metis_fast import config as config_module
from metis_fast.config import Config
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, InfrastructureError, Interrupted, MetisError
from metis_fast.model_folder import check_model_folder, load_processor, load_tokenizer
from metis_fast.own_folder import OwnFolder
from metis_fast.pictures import ImagePreparer
from metis_fast.rehearse import endpoints
from metis_fast.rehearse.model import write_model
from metis_fast.rehearse.script import ScriptedEngine
from metis_fast.rehearse.settings import KEY, KEY_VALUE, PROMPTS, ROLLOUTS, STEPS, Places, small
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import collect
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.protocols import open_dialect
from metis_fast.run import pipeline
from metis_fast.run.cold_start import sft
from metis_fast.run.interrupt import Interrupts
from metis_fast.score.judge import open_judge
from metis_fast.score.llm_prompt import read_prompt
from metis_fast.score.scoring import judge_groups
from metis_fast.standin import write_standin
from metis_fast.standin.sizes import picture_size
from metis_fast.summary import NoVerdict
from metis_fast.testing.judge import serving as serve_judge
from metis_fast.testing.search import serving as serve_search
from metis_fast.tools import open_toolbox
from metis_fast.types import Outcome, Verdict

_ROWS = 16
_PAGES = 40


@dataclass(frozen=True, slots=True)
class Stage:
    """What became of one stage. state: ok or failed. said: what it did, or what is wrong."""

    name: str
    state: str
    seconds: float
    said: str


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 1: a stage failed, later ones were left out; 130: stopped.

    Raises:
        ConfigError: the config cannot be read, or has nothing to rehearse.
    """
    config = config_module.load(args.config, args.overrides)
    pixels = picture_size(args.pixels, least=256)
    if not config.sft.phases and not config.data.train:
        raise ConfigError("nothing to rehearse: the config names neither sft.phases nor data.train; set one of them")
    with ExitStack() as stack:
        if args.out is None:
            scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-rehearsal-")
            stack.callback(scratch.close)
            folder = scratch.path / "job"  # who writes a folder into another one locks that, and this one's lock is taken
        else:
            folder = args.out
            try:
                folder.mkdir(parents=True, exist_ok=True)
                is_empty = not any(folder.iterdir())
            except OSError as error:
                raise ConfigError(
                    f"--out {folder} cannot be used: {error.strerror}; name a folder that can be written"
                ) from None
            if not is_empty:
                raise ConfigError(f"--out {folder} is not empty; name a new folder")
        rehearsal = Rehearsal(config, folder, pixels, stack)
        stages: list[Stage] = []
        for stage in rehearsal.stages():
            stages.append(stage)
            if stage.state == "stopped":
                print("metis-fast: the rehearsal was stopped; begin anew", file=sys.stderr)
                return 130
            if not args.json:
                print(f"{stage.state:7}{stage.name:22}{stage.seconds:7.1f} s  {stage.said}", flush=True)
        failed = any(stage.state == "failed" for stage in stages)
        if args.json:
            print(json.dumps({"stages": [asdict(stage) for stage in stages], "left_out": rehearsal.left_out}))
            return int(failed)
        for left in rehearsal.left_out:
            print(f"{'not':7}{left}")
        print("\nfailed: see above" if failed else "\nrehearsed: what is left is GPUs, keys and sizes")
        if args.out is not None:
            print(f"kept: {folder}", flush=True)
        return int(failed)


class Rehearsal:
    """Stages of one config in a folder. left_out: what of the config is not rehearsed, in words, once settings are made."""

    def __init__(self, config: Config, folder: Path, pixels: tuple[int, int], stack: ExitStack) -> None:
        """stack: closes what the stages leave open."""
        self._asked, self._folder, self._pixels, self._stack = config, folder, pixels, stack
        self._small = config
        self.left_out: list[str] = []

    def stages(self) -> Iterator[Stage]:
        """One after the other, until one fails."""
        for name, work in self._plan():
            began = time.perf_counter()
            try:
                said, state = work(), "ok"
            except (MetisError, InfrastructureError) as error:
                said, state = str(error), "failed"
            except Interrupted:
                said, state = "", "stopped"
            yield Stage(name, state, time.perf_counter() - began, said)
            if state != "ok":
                return

    def _plan(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "stand-ins", self._make
        if self._asked.sft.phases:
            yield "sft", self._sft
        if self._asked.data.train:
            yield "tools and judge", self._play
            yield "train", self._train
            yield "eval", self._eval

    def _make(self) -> str:
        """Data, model, endpoints, settings."""
        paths = write_standin(self._folder / "data", _ROWS, self._pixels, self._asked.run.seed)
        corpus = self._folder / "data" / "pages.parquet"
        _write_pages(corpus)
        files = PromptFiles([paths.rl])
        prompts = [files.read(i) for i in range(len(files))]
        model = self._folder / "model"
        write_model(self._asked, model, (message.content for prompt in prompts for message in prompt.messages))
        preparer = ImagePreparer(load_processor(model), cache_bytes=0)
        most = max(preparer.num_tokens(image) for prompt in prompts for image in prompt.images)
        judge = self._stack.enter_context(serve_judge(endpoints.judge(read_prompt(self._asked.score.llm.prompt))))
        finder = endpoints.TemplateServer(self._asked.tools.text_search.http, KEY_VALUE)
        search = self._stack.enter_context(serve_search(finder))
        before = os.environ.get(KEY)
        os.environ[KEY] = KEY_VALUE
        self._stack.callback(_restore, before)
        places = Places(model, paths.rl, paths.cold_start, corpus, paths.image_search_cache, judge, search)
        self._small, self.left_out = small(self._asked, self._folder / "run", places, most)
        width, height = self._pixels
        return f"{len(files)} prompts and conversations with images of {width} x {height}, a model of the same make"

    def _sft(self) -> str:
        """Two steps; what comes after has its export."""
        out = self._folder / "cold_start"
        sft(self._small, out)
        model = self._small.model.model_copy(update={"path": out})
        self._small = self._small.model_copy(update={"model": model})
        check_model_folder(out)
        rows = (self._small.run.dir / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(row)["loss"] for row in rows]
        return f"{len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, exported"

    def _play(self) -> str:
        """Every tool through the protocol, and verdicts on right and wrong answers."""
        config = self._small
        tokenizer = load_tokenizer(config.model.path)
        images = ImagePreparer(load_processor(config.model.path))
        files = PromptFiles(config.data.train)
        prompts = prompt_cursor(files, config.run.seed, shuffle=False, check=images.broken).next(PROMPTS)
        with Interrupts() as interrupts, ExitStack() as stack:
            scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
            stack.callback(scratch.close)
            toolbox = open_toolbox(config.tools, scratch.path)
            stack.callback(toolbox.close)
            chat = Chat(tokenizer, images, open_dialect(config), Offer(config.tools, toolbox.tools))
            judge = open_judge(config.score, files.styles())
            stack.callback(judge.close)
            interrupts.run(judge.check())
            # of the built-in ones: nobody knows what a call of another one would do
            calls = list(dict.fromkeys(config.tools.enabled))[: config.rollout.max_turns - 1]
            engine = ScriptedEngine(tokenizer, prompts, ROLLOUTS, calls)
            settings = config.rollout.model_copy(update={"deterministic": False, "max_turn_tokens": 0})
            groups = interrupts.run(collect(prompts, ROLLOUTS, chat, engine, toolbox, settings, config.run.seed, "rehearsal"))
            verdicts = [one for group in interrupts.run(judge_groups(groups, judge)) for one in group]
        turns = Counter(turn.outcome for group in groups for rollout in group.rollouts for turn in rollout.turns)
        missing = [one for one in verdicts if not isinstance(one, Verdict)]
        if missing or turns[Outcome.TOOL_ERROR]:
            why = next((one.text for one in missing if isinstance(one, NoVerdict)), "a tool could not be called as scripted")
            observed = next(
                (t.observation for g in groups for r in g.rollouts for t in r.turns if t.outcome is Outcome.TOOL_ERROR), ""
            )
            raise ConfigError(f"{why}: {observed[:300]}; see metis-fast doctor")
        right = sum(isinstance(one, Verdict) and one.correct for one in verdicts)
        named = ", ".join(tool.value for tool in calls)
        return f"{turns[Outcome.TOOL_RESULT]} calls ({named}), {right} of {len(verdicts)} answers right, as scripted"

    def _train(self) -> str:
        """Two steps, with the gate, checkpoints and the export."""
        summary = pipeline.train(self._small)
        check_model_folder(self._small.run.dir / "trained")
        back = f"{self._small.train.backend}, {self._small.rollout.engine}, {self._small.workers.launcher}"
        return f"{STEPS} steps ({back}), checkpointed and exported" + (
            "" if summary is None else ", evaluated before and after"
        )

    def _eval(self) -> str:
        """Of the export."""
        trained = self._small.model.model_copy(update={"path": self._small.run.dir / "trained"})
        run_ = self._small.run.model_copy(update={"dir": self._folder / "eval"})
        rates = pipeline.evaluate(self._small.model_copy(update={"model": trained, "run": run_}))
        return f"{rates['all'].num} rollouts of the exported model"


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(KEY, None)
    else:
        os.environ[KEY] = before


def _write_pages(path: Path) -> None:
    """A corpus for local search, of text and of images."""
    rows: list[dict[str, object]] = []
    for number in range(_PAGES):
        image = io.BytesIO()
        Image.new("RGB", (96, 64), (5 * number, 255 - 5 * number, 90)).save(image, "PNG")
        text = f"What stands on the sign is {number}."
        link = f"https://example.org/{number}"
        rows.append({"title": f"Sign {number}", "link": link, "text": text, "image": image.getvalue()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
