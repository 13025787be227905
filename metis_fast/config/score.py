"""Judges, rewards and advantages."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from metis_fast.config.section import (
    BY_CONTENT,
    MAY_CHANGE,
    FilePath,
    Fraction,
    JsonObject,
    NonNegative,
    NonNegativeFloat,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
    Several,
    Text,
)


class LlmPeer(Section):
    """One of several LLM judges. What is left out is as in `score.llm`."""

    base_url: Annotated[Text, MAY_CHANGE] = ""
    """Empty: that of `score.llm`."""
    model: Text = ""
    """Empty: that of `score.llm` where `base_url` is left out, too; else the one that the endpoint serves."""
    api_key_env: Annotated[Text, MAY_CHANGE] = ""
    """Empty: that of `score.llm`."""
    extra_body: OrNone[JsonObject] = None
    """None: that of `score.llm`."""

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_rest(cls, body: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        return body and _leaves_the_rest(body)


class LlmJudgeConfig(Section):
    """LLM judge: any endpoint that speaks the OpenAI chat-completions protocol."""

    base_url: Annotated[Text, MAY_CHANGE] = ""
    """For example http://127.0.0.1:8000/v1; also without `/v1`, or with the whole path. Empty: rows that a model is to judge
    are an error at start."""
    model: Text = ""
    """Model name to ask for. Empty: the one that the endpoint serves; several are an error at start."""
    prompt: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Text file of a prompt of your own, which names {question}, {truth} and {answer} (docs/llm-judge.md); none: the packaged
    one."""
    api_key_env: Annotated[Text, MAY_CHANGE] = "METIS_JUDGE_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one."""
    timeout_s: Annotated[PositiveFloat, MAY_CHANGE] = 60.0
    """Seconds for one request."""
    concurrency: Annotated[Positive, MAY_CHANGE] = 32
    """Requests in flight."""
    retries: Annotated[NonNegative, MAY_CHANGE] = 3
    """Tries after the first, with exponential back-off or as long as Retry-After says; then there is no verdict."""
    max_tokens: Annotated[Positive, MAY_CHANGE] = 4096
    """Longest reply. A judge that thinks needs room for it; one that does not ends after a word."""
    extra_body: JsonObject = Field(default={})
    """More of the request, for example {chat_template_kwargs: {enable_thinking: false}}."""
    cache: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """SQLite file of past verdicts; none: kept in memory."""
    judges: Several[LlmPeer] = ()
    """Several models that judge every answer, each on its own, and have to agree (`quorum`); none: the one above."""
    quorum: Literal["majority", "unanimous"] = "majority"
    """How many of `judges` must say the same: more than half of all of them, or all. One that fails has no vote; too few votes
    are no verdict."""

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_rest(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return _leaves_the_rest(body)

    @model_validator(mode="after")
    def _judges_differ(self) -> Self:
        if self.quorum != "majority" and not self.judges:
            raise ValueError(
                f"score.llm.quorum={self.quorum} is for several judges, and score.llm.judges names none; name them, or remove "
                "quorum"
            )
        named = [one for one in self.each() if one.model]
        for i, one in enumerate(named):
            if any(one.is_as(other) for other in named[:i]):
                raise ValueError(
                    f"score.llm.judges has {one.model!r} twice, which would be one vote counted twice; remove one of them"
                )
        return self

    def is_as(self, other: LlmJudgeConfig) -> bool:
        """Whether another judge is the same model: at the same address, whatever else is asked of it; or, wherever it is
        served, with the same `extra_body`."""
        here, there = (one.base_url.strip().rstrip("/").removesuffix("/v1") for one in (self, other))
        return self.model == other.model and (here == there or self.extra_body == other.extra_body)

    def each(self) -> tuple[LlmJudgeConfig, ...]:
        """The settings of every single judge: of `judges`, or these."""
        if not self.judges:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "base_url": one.base_url or self.base_url,
                    "model": one.model or ("" if one.base_url else self.model),
                    "api_key_env": one.api_key_env or self.api_key_env,
                    "extra_body": self.extra_body if one.extra_body is None else one.extra_body,
                    "judges": (),
                    "quorum": "majority",
                }
            )
            for one in self.judges
        )

    def key_names(self) -> tuple[str, ...]:
        """The environment variables that hold keys of judges."""
        return tuple(dict.fromkeys(one.api_key_env for one in self.each()))


def _leaves_the_rest(body: dict[str, JsonValue]) -> dict[str, JsonValue]:
    own = sorted(body.keys() & {"messages", "model", "n", "stream", "max_tokens", "max_completion_tokens"})
    if own:
        raise ValueError(f"{own[0]!r} is not for here; remove it (score.llm.model and max_tokens set theirs)")
    return body


class ScoreConfig(Section):
    """Rewards and advantages (ALGORITHM sections 2 to 4)."""

    judge: Literal["by_row", "llm", "rule", "math", "choice"] = "by_row"
    """Who judges. `by_row`: what each row asks for (`reward_model.style`). Any other: that judge, for every row, whatever it
    asks for; Metis-RL says `rule` in every row, and the paper's recipe has a model judge them all (`llm`)."""
    answer: Literal["last", "first"] = "last"
    """Which `<answer>` counts. `last`: of what the policy itself wrote. `first`: as the reference reads it, of the whole
    response, observations included; without question or ground truth it is wrong, and no judge is asked."""
    format: Literal["ours", "reference"] = "ours"
    """What r_fmt asks for. `ours`: tags that open and close in order, and an answer behind the last `</reason>`, which there
    must be. `reference`: tags of the whole response, counted; docs/llm-judge.md has both rules."""
    w_ans: NonNegativeFloat = 0.9
    """Weight of the answer in r_acc."""
    w_fmt: NonNegativeFloat = 0.1
    """Weight of the format in r_acc."""
    estimator: Literal["hdpo", "grpo", "coupled", "gdpo"] = "hdpo"
    """`hdpo`: two channels. Baselines: `grpo` (accuracy only), `coupled` (r_acc + alpha r_tool, one channel), `gdpo` (each
    reward normalised over the group, summed, normalised over the batch)."""
    alpha: NonNegativeFloat = 0.15
    """Weight of r_tool in `coupled` and `gdpo`."""
    norm_by_std: bool = True
    """False leaves out the division by the standard deviation (Dr. GRPO)."""
    number_tolerance: NonNegativeFloat = 0.0
    """Relative tolerance of the rule judge for numbers, beyond rounding: 3.1416 equals 3.14159 without any."""
    max_missing_share: Annotated[Fraction, MAY_CHANGE] = 0.5
    """Share of the answers of one judge style that may be left without a verdict; above it the run stops."""
    missing_steps: Annotated[Positive, MAY_CHANGE] = 1
    """Over how many steps that share is taken, the last one included. Several catch a judge that fails a little all the time.
    A step in which a style has no verdict at all stops the run in any case."""
    max_broken_share: Annotated[Fraction, MAY_CHANGE] = 1.0
    """Share of the rollouts, over as many steps, that failures of tools and engines may break off; above it the run stops."""
    llm: LlmJudgeConfig = LlmJudgeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.w_ans + self.w_fmt == 0:
            raise ValueError("score.w_ans and score.w_fmt are both 0, so every reward is; set one of them")
        return self
