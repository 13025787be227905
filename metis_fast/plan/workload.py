"""What a step of training has to do: rollouts as they are on average, and the passes that an update cuts them into."""

from __future__ import annotations

from dataclasses import dataclass

from metis_fast.config import Config
from metis_fast.errors import ConfigError
from metis_fast.train.flops import FlopModel


@dataclass(frozen=True, slots=True)
class Workload:
    """Means over rollouts and prompts.

    prompt, response: tokens. sampled: share of the response that the policy writes, the rest is observations. images: of a
    prompt, and image_tokens: of each. uniform: share of the groups in which no rollout has an advantage.
    """

    prompt: int
    response: int
    sampled: float = 0.5
    images: int = 1
    image_tokens: int = 1024
    uniform: float = 0.2

    @staticmethod
    def of(config: Config, prompt: int | None, response: int | None, **rest: float) -> Workload:
        """With an eighth of the settings' limits where a length is not given.

        Raises:
            ConfigError: a number is out of its range, or longer than the settings allow.
        """
        limits = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
        lengths = [
            max(1, limit // 8) if given is None else given for given, limit in zip((prompt, response), limits, strict=True)
        ]
        for name, length, limit in zip(("prompt", "response"), lengths, limits, strict=True):
            if not 0 < length <= limit:
                raise ConfigError(
                    f"--{name}-tokens: expected 1 to rollout.max_{name}_tokens={limit}, got {length}; change one of the two"
                )
        for name, low in (("sampled", 0.01), ("uniform", 0.0)):
            high = 1.0 if name == "sampled" else 0.99
            if not low <= rest[name] <= high:
                raise ConfigError(f"--{name}: expected a share from {low} to {high}, got {rest[name]}")
        if rest["images"] < 0 or rest["image_tokens"] < 1:
            raise ConfigError("--images: expected 0 or more, --image-tokens: 1 or more; set --images 0 for text alone")
        images, each = int(rest["images"]), int(rest["image_tokens"])
        if images * each > lengths[0]:
            raise ConfigError(
                f"{images} images of {each} tokens are more than the {lengths[0]} tokens of a prompt; "
                "lower --images or --image-tokens, or raise --prompt-tokens"
            )
        return Workload(lengths[0], lengths[1], rest["sampled"], images, each, rest["uniform"])


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Passes of one optimizer step over all data-parallel ranks, and what a mean one of them holds.

    pairs: (query, key) that see each other. image_flops: of the tower, forward. rows: tokens at the LM head.
    parts: that a group is cut into. uniform: share of the groups that are left out.
    """

    passes: int
    tokens: float
    pairs: float
    image_flops: float
    rows: float
    parts: int
    uniform: float


def mini_batch(config: Config, load: Workload, flops: FlopModel) -> MiniBatch:
    """As `train.pack` cuts groups of equal rollouts: whole rollouts, the prompt once a part of a group."""
    train, group, budget = config.train, config.rollout.rollouts_per_prompt, config.train.tokens_per_micro_batch
    p, r = load.prompt, load.response
    every = config.loss.kl_coef or config.loss.entropy_coef or config.loss.normalization == "reference"
    uniform = load.uniform if train.skip_zero_advantage and not every else 0.0
    groups = train.prompts_per_mini_batch * (1 - uniform)
    most = max(1, (budget - p) // r) if train.share_prompt else 1
    parts = -(-group // most)
    each = group / parts  # rollouts of a part
    tokens = p + each * r
    together = max(1, int(budget // tokens)) if train.share_packs else 1
    passes = max(1, round(-(-groups * parts // together)))
    num = groups * parts / passes  # parts of a pass
    pairs = p * p / 2 + each * (p * r + r * r / 2)
    side = round((load.image_tokens * flops.merge**2) ** 0.5)
    image = flops.image((1, side, side)) if flops.patch else 0.0
    copies = 1.0 if train.share_images else each
    rows = each * r * load.sampled if train.skip_head_rows else tokens
    return MiniBatch(passes, num * tokens, num * pairs, num * copies * load.images * image, num * rows, parts, uniform)
