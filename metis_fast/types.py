"""What flows through a training step, in the order in which it flows.

    Prompt -> Turn* -> Rollout -> Group -> ScoredGroup -> (train) -> StepStats

These frozen dataclasses are the only things that cross a stage or a process. Every invariant is checked where the object is
made, so that no later stage has to ask again.

Worked example, one search prompt with one rollout: `Prompt(ability="search", images=())` becomes a `Rollout` of S = 61
tokens, the first 20 of which are the prompt; `sampled` is True on the 27 tokens that the policy wrote in two turns and
False on the prompt and on the observation between the turns; the judge's `Verdict(correct=True, format_ok=True)` makes
`r_acc = 1.0`, one tool call makes `r_tool = 0.5`.

Shape letters: S tokens of one rollout (prompt included), G rollouts of a prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from metis_fast.compact import Compact

JsonScalar = str | int | float | bool | None


class Outcome(StrEnum):
    """How a turn or a rollout ended. A closed set: nothing ends in any other way.

    A turn ends in TOOL_RESULT, TOOL_ERROR, ANSWERED, LENGTH or TURN_LIMIT; a rollout in ANSWERED, LENGTH, TURN_LIMIT or
    INFRASTRUCTURE_ERROR. JUDGE_ERROR is set on the score of a rollout whose judge failed. A rollout that
    ended in INFRASTRUCTURE_ERROR or whose score is JUDGE_ERROR has no verdict and leaves its group.
    """

    ANSWERED = "answered"  # the policy ended its message without a tool call
    LENGTH = "length"  # the response reached its token limit
    TURN_LIMIT = "turn_limit"  # the last allowed turn still called a tool, which was not run
    TOOL_RESULT = "tool_result"  # a tool ran; its result is the observation
    TOOL_ERROR = "tool_error"  # the agent's fault; counts as a call, the error text is the observation
    INFRASTRUCTURE_ERROR = "infrastructure_error"  # our fault, after retries
    JUDGE_ERROR = "judge_error"  # our fault, in scoring


class ToolName(StrEnum):
    """The built-in tools (ALGORITHM: agent protocol); there may be others, of one's own or of MCP servers."""

    PYTHON = "python"
    TEXT_SEARCH = "text_search"
    IMAGE_SEARCH = "image_search"


@dataclass(frozen=True, slots=True)
class ImageBlob:
    """One encoded image (PNG, JPEG, WebP, ...), known by the SHA-256 of its bytes."""

    data: bytes = field(repr=False)
    sha256: str

    @staticmethod
    def of(data: bytes) -> ImageBlob:
        """Wrap encoded image bytes; the hash is computed here."""
        return ImageBlob(data=data, sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message.

    content: `<image>` marks where the next image of the prompt stands, unless `texts` says where images stand.
    texts: what stands before, between and behind the images, where `<image>` in it is text; empty: the parts of `content`.
    """

    role: str
    content: str
    texts: tuple[str, ...] = ()

    @property
    def around_images(self) -> tuple[str, ...]:
        """The texts before, between and behind the images; one more than there are images."""
        return self.texts or tuple(self.content.split("<image>"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data. Made by `data`, read by `rollout` and `score`.

    uid: stable name of the row, unique in a run ("<file>:<row>").
    ability: task category (the `ability` column of the Metis-RL schema), any text; reports have a slice for each.
    answers: accepted ground truths; the best one counts.
    judge_style: `reward_model.style`, which judge decides ("rule", "math", "choice", "llm", ...).
    question: what was asked, for LLM judges and reports (from `extra_info.question`, else the last user message).
    extra: the flat part of `extra_info`; never read by the training path, only reported (e.g. `kind` in the demo set).
    tools: `extra_info.tools`, names of those that the row has, where `tools.offer` is `row`; None where it lists none.
    """

    uid: str
    data_source: str
    messages: tuple[Message, ...]
    images: tuple[ImageBlob, ...]
    ability: str
    answers: tuple[str, ...]
    judge_style: str
    question: str
    extra: Mapping[str, JsonScalar] = field(default_factory=dict)
    tools: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        marks = sum(len(message.around_images) - 1 for message in self.messages)
        if marks != len(self.images):
            raise ValueError(f"prompt {self.uid}: {marks} `<image>` marks in the messages but {len(self.images)} images")

    @property
    def kind(self) -> str | None:
        """What `extra` says of it, shortened; None where it says nothing."""
        kind = self.extra.get("kind")
        return None if kind is None else str(kind)[:100]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool invocation as the policy wrote it.

    name: what the policy asked for, verbatim ("" where the call could not be parsed).
    arguments: the JSON text of the arguments ("" where it could not be parsed).
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool returned. Made by `tools`, read by `rollout`.

    text: what the agent reads; `<image>` marks where each of `images` stands (all at the end if there is no mark).
    outcome: TOOL_RESULT or TOOL_ERROR.
    """

    text: str
    images: tuple[ImageBlob, ...] = ()
    outcome: Outcome = Outcome.TOOL_RESULT


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant message and what followed it.

    start, stop: the sampled tokens of this turn are tokens[start:stop] of the rollout.
    observation_stop: the observation (with the chat template around it) is tokens[stop:observation_stop]; stop where there
        was no room for it.
    observation: the text that the agent reads in those tokens: what the protocol cut away is not in it.
    tool_s: seconds spent in the tool.
    """

    text: str
    start: int
    stop: int
    observation_stop: int
    outcome: Outcome
    call: ToolCall | None = None
    observation: str = ""
    tool_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageSpan(Compact):
    """Where an image's placeholder tokens stand in a rollout.

    grid: (t, h, w) in patches, before spatial merging; t * h * w / merge**2 = stop - start.
    """

    sha256: str
    start: int
    stop: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled trajectory. Made by `rollout`, read by `score` and `train`. Never decoded and re-encoded.

    tokens [S] int32: prompt, then response (sampled turns and observations).
    sampled [S] bool: True where the policy chose the token; only these carry loss.
    logp [S] float32: the engine's log-probability of each sampled token (temperature applied), 0 elsewhere.
    weight_version [S] int32: version of the weights that sampled the token, -1 where not sampled.
    images: each distinct image once, in order of first appearance.
    error: what went wrong, for INFRASTRUCTURE_ERROR.
    """

    prompt_uid: str
    index: int
    tokens: npt.NDArray[np.int32] = field(repr=False)
    prompt_len: int
    sampled: npt.NDArray[np.bool_] = field(repr=False)
    logp: npt.NDArray[np.float32] = field(repr=False)
    weight_version: npt.NDArray[np.int32] = field(repr=False)
    images: tuple[ImageBlob, ...]
    image_spans: tuple[ImageSpan, ...]
    turns: tuple[Turn, ...]
    outcome: Outcome
    error: str = ""

    def __post_init__(self) -> None:
        name, size = f"rollout {self.prompt_uid}#{self.index}", len(self.tokens)
        for field_name in ("sampled", "logp", "weight_version"):
            got = getattr(self, field_name).shape
            if got != (size,):
                raise ValueError(f"{name}: {field_name} has shape {got}, tokens have ({size},)")
        if self.sampled[: self.prompt_len].any():
            raise ValueError(f"{name}: a prompt token is marked as sampled")
        if not np.isfinite(self.logp).all() or (self.logp > 0).any() or self.logp[~self.sampled].any():
            raise ValueError(f"{name}: log-probs must be finite, <= 0, and 0 where nothing was sampled")
        if ((self.weight_version >= 0) != self.sampled).any():
            raise ValueError(f"{name}: every sampled token, and no other, needs a weight version")
        known, last = {image.sha256 for image in self.images}, 0
        if len(known) != len(self.images):
            raise ValueError(f"{name}: an image is stored twice")
        for span in self.image_spans:
            if span.sha256 not in known or span.start < last or span.stop <= span.start or span.stop > size:
                raise ValueError(f"{name}: image span {span} does not match the images or overlaps its neighbour")
            if self.sampled[span.start : span.stop].any():
                raise ValueError(f"{name}: image placeholder sampled by the policy at {span}")
            last = span.stop

    @property
    def num_sampled(self) -> int:
        """R_i: the number of tokens that carry loss."""
        return int(self.sampled.sum())

    @property
    def num_tool_calls(self) -> int:
        """T: tool invocations, failed and malformed ones included."""
        return sum(turn.call is not None for turn in self.turns)

    @property
    def response_text(self) -> str:
        """What the policy itself wrote, turns joined, observations left out."""
        return "".join(turn.text for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """S: prompt and response."""
        return len(self.tokens)

    @property
    def prompt_key(self) -> bytes:
        """Equal for rollouts whose prompts are, token for token and image for image."""
        spans = tuple(span for span in self.image_spans if span.start < self.prompt_len)
        return hashlib.sha256(self.tokens[: self.prompt_len].tobytes() + repr(spans).encode()).digest()


@dataclass(frozen=True, slots=True)
class Group:
    """The G rollouts of one prompt. Made by `rollout`, read by `score`."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Verdict(Compact):
    """What a judge says of one rollout.

    correct: r_ans in {0, 1}. format_ok: r_fmt in {0, 1}.
    answer: the text that was judged ("" if the rollout has none).
    judge: who says that it is correct or not: a style, a model, a quorum; "" where nobody had to be asked. reason: why, in one
        short line. Both are for people, and "" in rollouts that were stored before there were reasons.
    """

    correct: bool
    format_ok: bool
    answer: str
    judge: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Score(Compact):
    """One rollout's rewards and advantages (ALGORITHM sections 2 and 3).

    verdict: None where the judge or our machinery failed; such a rollout left its group and all numbers are 0.
    no_verdict: what the judge failed at, in one line, for people; "" where it did not.
    qualifies: in Q_p (r_ans = 1). in_tool_denominator: in a Q_p *with signal*; its tokens count in N_tool.
    needs_gradient: at least one advantage is not exactly 0, by comparison of rewards, never of advantages.
    """

    verdict: Verdict | None
    outcome: Outcome
    r_acc: float = 0.0
    r_tool: float = 0.0
    adv_acc: float = 0.0
    adv_tool: float = 0.0
    qualifies: bool = False
    in_tool_denominator: bool = False
    needs_gradient: bool = False
    no_verdict: str = ""

    def __post_init__(self) -> None:
        for name in ("r_acc", "r_tool", "adv_acc", "adv_tool"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}; check the judge and the rewards")


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with the score of every rollout. Made by `score`, read by `train` and `report`."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.rollouts) != len(self.scores):
            raise ValueError(f"group {self.prompt.uid}: {len(self.rollouts)} rollouts but {len(self.scores)} scores")

    @property
    def ability(self) -> str:
        """Of the prompt."""
        return self.prompt.ability

    @property
    def kind(self) -> str | None:
        """Of the prompt."""
        return self.prompt.kind


@dataclass(frozen=True, slots=True)
class Avoided:
    """What a saving left out: tokens (those of the tower for images, rows for the LM head) and model FLOPs."""

    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Savings:
    """What one optimizer step did not compute, against every rollout run alone with its images and the LM head on every token.

    Each counts what is left to save behind those before it, so that run and avoided FLOPs add up to those of the plain step.
    old_logprobs: passes that were not owed; rollouts: without a gradient; prompts: repeats in a pass; images: repeats in a
    pass; head: tokens without a gradient coefficient.
    """

    old_logprobs: Avoided = Avoided()
    rollouts: Avoided = Avoided()
    prompts: Avoided = Avoided()
    images: Avoided = Avoided()
    head: Avoided = Avoided()


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one optimizer step did. Made by `train`.

    loss_acc, loss_tool: the two terms of ALGORITHM section 4, before their weights; 0 where the weight is 0.
    clip_acc, clip_tool: share of the tokens of each channel (non-zero weighted advantage) whose surrogate is clipped.
    kl: mean of logp_old - logp (k1); ratio_max, ratio_min; entropy: mean; engine_gap: mean |logp_old - logp_engine|. These five
    are over the tokens that reached the LM head, which leaves out what needs no gradient.
    num_tokens: tokens run through the decoder, passes for log-probabilities included; flops: model FLOPs of all passes.
    skipped_step: nothing in the mini-batch had a gradient.
    """

    loss: float
    loss_acc: float
    loss_tool: float
    grad_norm: float
    lr: float
    clip_acc: float
    clip_tool: float
    kl: float
    ratio_max: float
    ratio_min: float
    entropy: float
    engine_gap: float
    num_tokens: int
    flops: float
    avoided: Savings
    n_acc: int
    n_tool: int
    skipped_step: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """Rates over one kind of prompt (an ability, a `kind` of the demo set, or "all").

    num_no_verdict: rollouts that left their group; all rates are over the others.
    """

    num: int
    num_no_verdict: int
    accuracy: float
    tool_rate: float  # share of rollouts with at least one tool call
    tool_calls: float  # mean calls a rollout
    format_rate: float
    response_tokens: float


@dataclass(frozen=True, slots=True)
class StepStats:
    """One training step, as logged. Made by `pipeline`, read by `report`.

    slices: "all", "<ability>", "<kind>", "<ability>/<kind>" -> rates over this step's rollouts.
    outcomes: number of rollouts by how they ended; infra_failed_rate: share that our machinery broke off; judge_failed_rate:
    share of the others whose judge failed; tool_errors: number of turns that ended in TOOL_ERROR.
    qualifying_share: share of rollouts in Q_p; signal_share: share of groups whose Q_p has signal.
    seconds: stage -> wall seconds; cpu_seconds: CPU seconds of this process, of all its threads.
    staleness: trained tokens by age; place a counts those sampled by weights that lacked the last a updates.
    groups_in_flight: sampled on during the update; groups_carried: begun for this step or before, not taken by it;
    groups_dropped: were too slow for it, and are begun again; groups_replayed: were lost with their node, and played again.
    sync_bytes: weights moved to the slowest engine before this step; sync_retries: transfers that had to be made again.
    """

    step: int
    epoch: int
    reward_acc: float
    reward_tool: float
    slices: Mapping[str, Slice]
    outcomes: Mapping[str, int]
    tool_errors: int
    qualifying_share: float
    signal_share: float
    bad_rows_skipped: int
    updates: tuple[UpdateStats, ...]
    seconds: Mapping[str, float]
    staleness: tuple[int, ...] = ()
    groups_in_flight: int = 0
    groups_carried: int = 0
    groups_dropped: int = 0
    groups_replayed: int = 0
    sync_bytes: int = 0
    sync_retries: int = 0
    infra_failed_rate: float = 0.0
    judge_failed_rate: float = 0.0
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
