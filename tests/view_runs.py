"""Run folders as training leaves them, for tests of the page: the real writers, scores by the real formulas, and rollouts that
say what demo agents say, with a tokenizer that reads them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from metis_fast import config as configuration
from metis_fast.config import LogConfig, ScoreConfig
from metis_fast.report.log import RunLog
from metis_fast.report.slices import KINDS, slices
from metis_fast.report.summary import write_summary
from metis_fast.rollout.store import RolloutStore
from metis_fast.score.advantage import GroupRewards, advantages
from metis_fast.testing.tiny import build_tokenizer
from metis_fast.types import (
    Avoided,
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Savings,
    Score,
    ScoredGroup,
    StepStats,
    ToolCall,
    Turn,
    UpdateStats,
    Verdict,
)

ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BOX = (24, 40, 120, 104)
ABILITIES = ("math", "perception", "search")
CODE = f"box = {BOX}\npanel = image_1.crop(box)\npanel.resize((192, 128)).show()\nprint('size', panel.size)"
_TEXTS = [
    "<reason>The panel is small, I should look closer.</reason>\n",
    "<reason>I can read it as it is.</reason>\n<answer>42</answer><answer>41</answer>",
    f"<tool_call>{json.dumps({'name': 'python', 'arguments': {'code': CODE}})}</tool_call>",
    f"Which number stands in the panel? {ATTACK}",
]


def question_of(row: int) -> str:
    return f"Which number stands in panel {row}?" + (f" {ATTACK}" if row % 3 == 1 else "")


def photo(seed: int) -> Image.Image:
    """A picture whose every part looks different."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.rectangle(BOX, outline="white", width=2)
    draw.text((BOX[0] + 30, BOX[1] + 24), str(40 + seed % 9), fill="white")
    return image


def blob(image: Image.Image) -> ImageBlob:
    out = io.BytesIO()
    image.save(out, "PNG")
    return ImageBlob.of(out.getvalue())


class Maker:
    """Makes groups. Pictures and crops are of few kinds, so that many rollouts are made fast."""

    def __init__(self, seed: int = 0) -> None:
        self.tokenizer = build_tokenizer(_TEXTS, 600)
        self.generator = np.random.default_rng(seed)
        self.photos = [photo(i) for i in range(6)]
        self.blobs = [blob(image) for image in self.photos]
        self.crops = [blob(image.crop(BOX).resize((192, 128))) for image in self.photos]
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]

    def rollout(self, prompt: Prompt, index: int, calls: int, right: bool, version: int) -> Rollout:
        place = self.blobs.index(prompt.images[0])
        pad = self.ids("<|image_pad|>")[0]
        tokens, sampled = list[int](), list[bool]()
        spans, turns = list[ImageSpan](), list[Turn]()
        images = {prompt.images[0].sha256: prompt.images[0]}

        def add(ids: list[int], own: bool) -> None:
            tokens.extend(ids)
            sampled.extend([own] * len(ids))

        def picture(one: ImageBlob) -> None:
            images[one.sha256] = one
            spans.append(ImageSpan(one.sha256, len(tokens), len(tokens) + 12, (1, 6, 8)))
            add([pad] * 12, False)

        add(self.ids("<|im_start|>user\n"), False)
        picture(prompt.images[0])
        add(self.ids(f"{prompt.question}<|im_end|>\n<|im_start|>assistant\n"), False)
        prompt_len = len(tokens)
        for number in range(calls):
            call = ToolCall("python", json.dumps({"code": CODE})) if number == 0 else ToolCall("python", '{"code": "1 / 0"}')
            written = f'{{"name": "python", "arguments": {call.arguments}}}'
            text = f"<reason>The panel is small, I should look closer.</reason>\n<tool_call>{written}</tool_call>"
            start = len(tokens)
            add(self.ids(text), True)
            stop = len(tokens)
            add(self.ids("<|im_end|>\n<|im_start|>user\n"), False)
            if number == 0:
                seen, outcome = f"size (96, 64)\n<image>\n{ATTACK}", Outcome.TOOL_RESULT
                picture(self.crops[place])
            else:
                seen, outcome = "ZeroDivisionError: division by zero", Outcome.TOOL_ERROR
            add(self.ids(f"{seen.replace('<image>', '')}<|im_end|>\n<|im_start|>assistant\n"), False)
            turns.append(Turn(text, start, stop, len(tokens), outcome, call, seen, 0.01 * (number + 1)))
        last = f"<reason>I can read it as it is.</reason>\n<answer>{prompt.answers[0] if right else 41}</answer>"
        start = len(tokens)
        add(self.ids(last), True)
        turns.append(Turn(last, start, len(tokens), len(tokens), Outcome.ANSWERED))
        mask = np.array(sampled)
        logp = np.where(mask, -self.generator.exponential(0.4, len(tokens)), 0.0).astype(np.float32)
        versions = np.where(mask, version, -1).astype(np.int32)
        return Rollout(
            prompt_uid=prompt.uid,
            index=index,
            tokens=np.array(tokens, np.int32),
            prompt_len=prompt_len,
            sampled=mask,
            logp=logp,
            weight_version=versions,
            images=tuple(images.values()),
            image_spans=tuple(spans),
            turns=tuple(turns),
            outcome=Outcome.ANSWERED,
        )

    def group(self, row: int, step: int, size: int, progress: float, broken: bool = False) -> ScoredGroup:
        """broken: its first rollout was broken off, and the judge of its second one failed."""
        kind, ability = KINDS[row % 3], ABILITIES[row // 3 % 3]
        place = row % len(self.blobs)
        prompt = Prompt(
            f"data/train.parquet:{row}", "demo", (Message("user", "<image>?"),), (self.blobs[place],), ability, ("42",), "rule",
            question_of(row), {"kind": kind},
        )  # fmt: skip
        tool = {"direct": 0.95 - 0.9 * progress, "uncertain": 0.9 - 0.3 * progress, "tool_needed": 0.97}[kind]
        rollouts, verdicts = list[Rollout](), list[Verdict | None]()
        for index in range(size):
            calls = int(self.generator.random() < tool) * int(self.generator.integers(1, 3))
            right = bool(self.generator.random() < 0.55 + 0.35 * progress)
            rollouts.append(self.rollout(prompt, index, calls, right, step))
            verdicts.append(
                Verdict(right, True, "42" if right else "41", "rule", f"{'equal' if right else 'differs'} {ATTACK}")
            )
        if broken:
            rollouts[0] = dataclasses.replace(
                rollouts[0], outcome=Outcome.INFRASTRUCTURE_ERROR, error="the tool server is gone"
            )
            verdicts[0] = verdicts[1] = None
        return ScoredGroup(prompt, tuple(rollouts), _scores(rollouts, verdicts))


def _scores(rollouts: list[Rollout], verdicts: list[Verdict | None]) -> tuple[Score, ...]:
    right = np.array([verdict is not None and verdict.correct for verdict in verdicts])
    valid = np.array([verdict is not None for verdict in verdicts])
    r_acc = np.where(valid, 0.9 * right + 0.1, 0.0)
    r_tool = np.array([1 / (one.num_tool_calls + 1) if ok else 0.0 for one, ok in zip(rollouts, right, strict=True)])
    made = advantages([GroupRewards(r_acc, r_tool, right, valid)], ScoreConfig())[0]
    scores = []
    for i, verdict in enumerate(verdicts):
        if verdict is None:
            ours = rollouts[i].outcome is Outcome.INFRASTRUCTURE_ERROR
            scores.append(
                Score(
                    None, Outcome.INFRASTRUCTURE_ERROR if ours else Outcome.JUDGE_ERROR, no_verdict="" if ours else "no answer"
                )
            )
            continue
        scores.append(
            Score(
                verdict, Outcome.ANSWERED, float(r_acc[i]), float(r_tool[i]), float(made.adv_acc[i]), float(made.adv_tool[i]),
                bool(right[i]), bool(made.in_tool_denominator[i]), bool(made.needs_gradient[i]),
            )
        )  # fmt: skip
    return tuple(scores)


def update(progress: float, generator: np.random.Generator) -> UpdateStats:
    return UpdateStats(
        loss=-0.01 * generator.random(),
        loss_acc=-0.01 * progress,
        loss_tool=-0.02 * progress**2,
        grad_norm=float(generator.lognormal(-0.5, 0.3)),
        lr=1e-6,
        clip_acc=0.002 * generator.random(),
        clip_tool=0.003 * generator.random(),
        kl=1e-4 * generator.random(),
        ratio_max=1 + float(generator.exponential(0.6)),
        ratio_min=float(np.exp(-generator.exponential(0.5))),
        entropy=0.9 - 0.5 * progress,
        engine_gap=0.004,
        num_tokens=9000,
        flops=9e12,
        avoided=Savings(rollouts=Avoided(30, 2e12), prompts=Avoided(120, 5e11)),
        n_acc=5000,
        n_tool=2500,
    )


def stats(step: int, progress: float, groups: list[ScoredGroup], generator: np.random.Generator) -> StepStats:
    scores = [score for group in groups for score in group.scores]
    counted = [score.outcome.value for score in scores]
    with_signal = sum(any(score.in_tool_denominator for score in group.scores) for group in groups)
    return StepStats(
        step=step,
        epoch=0,
        reward_acc=float(np.mean([score.r_acc for score in scores])),
        reward_tool=float(np.mean([score.r_tool for score in scores])),
        slices=slices(groups),
        outcomes={name: counted.count(name) for name in sorted(set(counted))},
        tool_errors=3,
        qualifying_share=float(np.mean([score.qualifies for score in scores])),
        signal_share=with_signal / len(groups),
        bad_rows_skipped=0,
        updates=(update(progress, generator), update(progress, generator)),
        seconds={"rollout": 4 + generator.random(), "score": 0.3, "update": 2.5 - progress, "sync": 0.2},
        staleness=(800, 200),
    )


def write_benchmark(folder: Path, step: int, value: float) -> Path:
    """A result after a training step, in a run folder."""
    place = folder / "benchmarks" / f"step-{step:06d}" / "vstar"
    place.mkdir(parents=True)
    figure = {"name": "accuracy", "value": value, "error": 0.02, "n": 191, "missing": 0, "low": None, "high": None}
    result = {"benchmark": "vstar", "title": "V*", "questions": 191, "scorers": {"rule": {"figures": [figure]}}}
    more = {"settings": {"tools": "on"}, "warnings": [f"another file: {ATTACK}"], "tool_rate": {"value": 0.4, "error": None}}
    (place / "result.json").write_text(json.dumps(result | more))
    return place / "result.json"


def write_run(folder: Path, *, steps: int = 12, prompts: int = 9, size: int = 8, seed: int = 0, w_tool: float = 0.15) -> Path:
    """A finished run, with a part of rollouts for every step."""
    maker = Maker(seed)
    store = RolloutStore(folder / "rollouts")
    with RunLog(folder, LogConfig(tensorboard=False)) as log:
        for step in range(steps):
            progress = step / max(1, steps - 1)
            groups = [maker.group(row, step, size, progress, broken=row == 4) for row in range(prompts)]
            store.write(f"step-{step:06d}", groups)
            if step % 3 == 0:
                log.evaluation(step, slices(groups))
            log.step(stats(step, progress, groups, maker.generator))
    rates = [slices([maker.group(row, 0, size, progress) for row in range(9)]) for progress in (0.0, 1.0)]
    write_summary(folder / "summary.json", seed=seed, wall_s=1503.2, before=rates[0], after=rates[1])
    tree = {"run": {"seed": seed, "dir": str(folder)}, "loss": {"w_tool": w_tool}, "train": {"steps": steps}}
    (folder / "config.yaml").write_text(configuration.to_yaml(configuration.build(tree)))
    maker.tokenizer.save_pretrained(folder / "trained")
    return folder
