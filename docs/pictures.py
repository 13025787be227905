"""Draws the pictures of docs/concepts: `python docs/pictures.py`. What they show of numbers is computed, not written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from metis_fast.config import ScoreConfig
from metis_fast.score.advantage import GroupRewards, advantages

FOLDER = Path(__file__).parent / "concepts"
_STYLE = """
    .page { fill: #fff } text { fill: #1f2328 } .small { font-size: 12px; fill: #57606a } .bold { font-weight: 600 }
    .box { fill: #f6f8fa; stroke: #8c959f } .line { stroke: #57606a; stroke-width: 1.5; fill: none }
    .blue { fill: #0969da } .orange { fill: #bc4c00 } .grey { fill: #d0d7de } .green { fill: #1a7f37 } .red { fill: #cf222e }
    text.on { fill: #fff }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } text { fill: #e6edf3 } .small { fill: #9198a1 } .box { fill: #151b23; stroke: #656c76 }
      .line { stroke: #9198a1 } .blue { fill: #1f6feb } .orange { fill: #bd561d } .grey { fill: #3d444d }
      .green { fill: #238636 } .red { fill: #da3633 }
    }
"""


@dataclass
class Picture:
    """An SVG that grows. Coordinates in pixels from its upper left corner."""

    title: str
    told: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """One line; y: its base line."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", rx: float = 6) -> None:
        """A rectangle."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{rx:g}"/>')

    def said(self, x: float, y: float, width: float, height: float, title: str, *lines: str) -> None:
        """A box with a title and small lines."""
        self.box(x, y, width, height)
        self.text(x + 12, y + 24, title, "bold")
        for number, line in enumerate(lines):
            self.text(x + 12, y + 44 + 17 * number, line, "small")

    def arrow(self, *points: tuple[float, float], words: str = "") -> None:
        """Along the points; words stand above its first leg's middle."""
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        self.parts.append(f'<path class="line" d="{path}" marker-end="url(#end)"/>')
        if words:
            (x, y), (to_x, to_y) = points[:2]
            self.text((x + to_x) / 2, (y + to_y) / 2 - 6, words, "small", "middle")

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="system-ui, sans-serif" font-size="14" role="img" aria-labelledby="title told">'
        )
        marker = (
            '<defs><marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="small" d="M0 0L10 5L0 10z"/></marker></defs>'
        )
        names = f'<title id="title">{escape(self.title)}</title>\n<desc id="told">{escape(self.told)}</desc>'
        page = f'<rect class="page" width="{self.width}" height="{self.height}"/>'
        return "\n".join([head, names, f"<style>{_STYLE}</style>", marker, page, *self.parts, "</svg>", ""])


def hdpo() -> Picture:
    """Two channels of one group of eight."""
    calls, right = (0, 0, 1, 1, 2, 3, 0, 2), (True, True, True, True, True, True, False, False)
    correct = np.array(right)
    rewards = GroupRewards(
        0.9 * correct + 0.1, np.where(correct, 1 / (1 + np.array(calls)), 0.0), correct, np.ones(len(calls), np.bool_)
    )
    (found,) = advantages([rewards], ScoreConfig())
    picture = Picture(
        "One group, two channels",
        "Eight rollouts of one prompt. In the accuracy channel the six right ones are above zero, the two wrong ones below. "
        "In the tool channel only the six right ones count: those without a call are above zero, those with more below.",
        760,
        330,
    )
    for x, words in ((130, "calls"), (200, "answer"), (380, "A_acc, over all"), (610, "A_tool, over the right ones")):
        picture.text(x, 30, words, "bold", "middle")
    for i, (num, good) in enumerate(zip(calls, right, strict=True)):
        y = 46 + 33 * i
        picture.text(20, y + 19, f"rollout {i}")
        picture.text(130, y + 19, str(num), anchor="middle")
        picture.text(200, y + 19, "right" if good else "wrong", anchor="middle")
        for middle, values, kind in ((380, found.adv_acc, "blue"), (610, found.adv_tool, "orange")):
            if kind == "orange" and not good:
                picture.text(middle + 8, y + 19, "not in it", "small")
                continue
            length = 45 * float(values[i])
            picture.box(min(middle, middle + length), y + 4, abs(length), 22, kind, 2)
            ahead = 6 if length >= 0 else -6
            picture.text(middle + length + ahead, y + 19, f"{values[i]:+.2f}", "small", "start" if length >= 0 else "end")
    for middle in (380, 610):
        picture.parts.append(f'<path class="line" d="M{middle} 42V314"/>')
    return picture


def step() -> Picture:
    """What a step does, in order."""
    picture = Picture(
        "A step",
        "Rows become prompts; nodes play sixteen rollouts of each with engines and tools; a judge says which are right; "
        "the run scores them; ranks run packs and step; new weights go back to the engines.",
        860,
        250,
    )
    stages = (
        ("read", "rows in a fixed", "order, images", "as they are"),
        ("play", "16 rollouts a", "prompt: engine", "and tools"),
        ("judge", "right, wrong,", "or no verdict"),
        ("score", "two rewards,", "two advantages,", "masks"),
        ("update", "packs, one loss,", "one backward", "pass"),
        ("sync", "new weights to", "every engine"),
    )
    for i, (title, *lines) in enumerate(stages):
        picture.said(14 + 141 * i, 40, 121, 104, title, *lines)
        if i:
            picture.arrow((14 + 141 * i - 20, 90), (14 + 141 * i - 3, 90))
    picture.arrow((780, 144), (780, 190), (216, 190), (216, 147))
    picture.text(498, 182, "the next step samples with them", "small", "middle")
    picture.text(14, 26, "nodes", "bold")
    picture.text(437, 26, "the run", "bold")
    picture.text(578, 26, "ranks", "bold")
    picture.text(14, 232, "rollout.mode: sync plays and trains in turn; async plays ahead while the ranks train.", "small")
    return picture


def packs() -> Picture:
    """Who sees whom in a pack."""
    picture = Picture(
        "A pack with a shared prompt",
        "A square of queries by keys. The prompt stands once and is causal. Three rollouts stand behind it. Each sees the "
        "whole prompt and its own earlier tokens, and no other rollout.",
        760,
        330,
    )
    cell, prompt, sizes = 14, 8, (5, 3, 4)
    starts, total = [], prompt
    for size in sizes:
        starts.append(total)
        total += size
    left, top = 110, 50

    def segment(token: int) -> int:
        return -1 if token < prompt else max(i for i, start in enumerate(starts) if token >= start)

    for query in range(total):
        for key in range(total):
            own, other = segment(query), segment(key)
            sees = key <= query and other in (-1, own)
            kind = "grey" if not sees else "blue" if other == -1 else "orange"
            if sees or key <= query:
                picture.box(left + cell * key, top + cell * query, cell - 2, cell - 2, kind, 2)
    picture.text(left, 24, "keys: the prompt once", "small")
    picture.text(left + cell * (prompt + 1), 40, "rollouts 0, 1, 2 behind it", "small")
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        picture.text(left - 8, top + cell * (start + size / 2) + 4, f"rollout {i}", "small", "end")
    picture.text(left - 8, top + cell * prompt / 2 + 4, "prompt", "small", "end")
    for i, (kind, words) in enumerate(
        (
            ("blue", "sees the prompt"),
            ("orange", "sees its own earlier tokens"),
            ("grey", "does not see another rollout"),
        )
    ):
        picture.box(450, 80 + 30 * i, 14, 14, kind, 2)
        picture.text(474, 92 + 30 * i, words)
    lines = ("Positions are those of a rollout alone.", "The prompt's last token predicts the", "first token of every rollout.")
    for i, line in enumerate(lines):
        picture.text(450, 200 + 20 * i, line, "small")
    return picture


def fused_head() -> Picture:
    """LM head and loss as one operation."""
    picture = Picture(
        "The fused head",
        "Hidden states of live tokens meet the head a piece at a time. Statistics of each row give the log-prob; "
        "the loss gives one coefficient a token; the same pieces then give both gradients. Whole logits are never there.",
        860,
        300,
    )
    picture.said(20, 60, 150, 96, "hidden", "live tokens only:", "those with a gradient", "coefficient")
    picture.said(20, 180, 150, 76, "head", "[V, H], a piece of", "it at a time")
    picture.said(240, 100, 170, 96, "1. product", "a tile of logits,", "max and sum of exps,", "then it is gone")
    picture.said(460, 100, 170, 100, "loss", "log-prob, ratio, both", "surrogates, clips: one", "number a token")
    picture.said(680, 60, 160, 76, "2. product", "gradient of the", "hidden states")
    picture.said(680, 170, 160, 76, "3. product", "gradient of the head")
    picture.arrow((170, 108), (238, 130))
    picture.arrow((170, 218), (238, 170))
    picture.arrow((410, 148), (458, 148))
    picture.arrow((630, 140), (678, 104))
    picture.arrow((630, 170), (678, 206))
    picture.text(20, 30, "Three matrix products a live token are the floor; nothing of size [tokens, vocabulary] is kept.")
    return picture


def truth_gate() -> Picture:
    """Engine against trainer."""
    picture = Picture(
        "The truth gate",
        "The engine samples messages and reports their log-probs; the trainer computes those of the same tokens. A small "
        "difference lets the step begin. A large one stops the run and names the side and the layer that are wrong.",
        860,
        250,
    )
    picture.said(20, 30, 170, 76, "engine", "samples messages,", "says their log-probs")
    picture.said(20, 150, 170, 76, "trainer", "log-probs of the", "same tokens")
    picture.said(280, 86, 200, 90, "mean difference", "worst message against", "2e-2 (bfloat16) or", "1e-4 (float32)")
    picture.said(580, 30, 250, 60, "below: the step begins", "engine_gap goes on watching")
    picture.said(
        580, 130, 250, 96, "above: the run stops", "transformers' own model says which", "side is wrong, and at which layer"
    )
    picture.arrow((190, 68), (278, 112))
    picture.arrow((190, 188), (278, 150))
    picture.arrow((480, 112), (578, 62))
    picture.arrow((480, 150), (578, 176))
    return picture


def faults() -> Picture:
    """What a failure becomes."""
    picture = Picture(
        "What a failure becomes",
        "An error of the agent is an observation and counts as a call. A failure of tools, engines or nodes makes the rollout "
        "start again. A judge that fails gives no verdict. None of ours becomes a reward.",
        860,
        270,
    )
    rows = (
        ("The agent's own", "broken JSON, an exception in its code", "an observation; it counts as a call", "blue"),
        ("A tool server, an engine", "dies, hangs, answers garbage", "played again; then no verdict", "orange"),
        ("A node, Ray, a machine", "dies or is silent", "its groups are played again elsewhere", "orange"),
        ("A judge", "cannot be reached, contradicts itself", "no verdict: leaves its group, is counted", "orange"),
        ("Too many of these", "a stated share of a step", "the run stops, its state saved", "red"),
    )
    for i, (who, how, what, kind) in enumerate(rows):
        y = 20 + 48 * i
        picture.box(20, y, 8, 36, kind, 2)
        picture.text(40, y + 23, who, "bold")
        picture.text(248, y + 23, how)
        picture.arrow((528, y + 18), (554, y + 18))
        picture.text(564, y + 23, what)
    return picture


PICTURES: Sequence[Callable[[], Picture]] = (hdpo, step, packs, fused_head, truth_gate, faults)


def main() -> None:
    """Writes all of them."""
    for draw in PICTURES:
        (FOLDER / f"{draw.__name__.replace('_', '-')}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
