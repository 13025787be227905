"""Advantages of a batch of groups (ALGORITHM section 3), and the baselines HDPO is compared with.

Shape letters: G rollouts of a group, which may differ from group to group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from metis_fast.config import ScoreConfig

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it (the public recipe's value)."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class GroupRewards:
    """The rewards of one group.

    r_acc, r_tool [G] float64. correct [G] bool: r_ans = 1, the rollout is in Q_p. valid [G] bool: there is a verdict; what
    stands in the other arrays where there is none is never read.
    """

    r_acc: Floats
    r_tool: Floats
    correct: Bools
    valid: Bools

    def __post_init__(self) -> None:
        shapes = {array.shape for array in (self.r_acc, self.r_tool, self.correct, self.valid)}
        if len(shapes) != 1 or len(shapes.pop()) != 1:
            raise ValueError("r_acc, r_tool, correct and valid of a group must be vectors of one length")


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """The advantages of one group; 0 and False where there is no verdict.

    adv_acc, adv_tool [G] float32. Baselines other than HDPO have one advantage; it stands in adv_acc.
    in_tool_denominator [G] bool: in a Q_p with signal.
    needs_gradient [G] bool: some reward that its advantages are made of differs from another in the same mean. (In such a
    group an advantage can still come out as 0, for a reward that equals the mean.)
    """

    adv_acc: npt.NDArray[np.float32]
    adv_tool: npt.NDArray[np.float32]
    in_tool_denominator: Bools
    needs_gradient: Bools


@dataclass(frozen=True, slots=True, eq=False)
class _Channel:
    """values [G] float64: 0 outside the members. signal: the members' rewards are not all equal."""

    values: Floats
    signal: bool


def _channel(rewards: Floats, members: Bools, norm_by_std: bool) -> _Channel:
    """(r - mean) / (std + EPSILON) over `members`; exactly 0 where their rewards are all equal, one or none included."""
    values = np.zeros(len(rewards))
    inside = rewards[members]
    if inside.size == 0 or inside.max() == inside.min():
        return _Channel(values, signal=False)
    centred = inside - inside.mean()
    values[members] = centred / (inside.std(ddof=1) + EPSILON) if norm_by_std else centred
    return _Channel(values, signal=True)


def _one_advantage(channel: _Channel, group: GroupRewards) -> GroupAdvantages:
    size = len(group.valid)
    return GroupAdvantages(
        adv_acc=channel.values.astype(np.float32),
        adv_tool=np.zeros(size, dtype=np.float32),
        in_tool_denominator=np.zeros(size, dtype=bool),
        needs_gradient=group.valid & channel.signal,
    )


def _hdpo(groups: Sequence[GroupRewards], config: ScoreConfig) -> list[GroupAdvantages]:
    out = []
    for group in groups:
        qualifying = group.valid & group.correct
        acc = _channel(group.r_acc, group.valid, config.norm_by_std)
        tool = _channel(group.r_tool, qualifying, config.norm_by_std)
        in_denominator = qualifying & tool.signal
        out.append(
            GroupAdvantages(
                adv_acc=acc.values.astype(np.float32),
                adv_tool=tool.values.astype(np.float32),
                in_tool_denominator=in_denominator,
                needs_gradient=(group.valid & acc.signal) | in_denominator,
            )
        )
    return out


def _grpo(groups: Sequence[GroupRewards], config: ScoreConfig) -> list[GroupAdvantages]:
    return [_one_advantage(_channel(group.r_acc, group.valid, config.norm_by_std), group) for group in groups]


def _coupled(groups: Sequence[GroupRewards], config: ScoreConfig) -> list[GroupAdvantages]:
    return [
        _one_advantage(_channel(group.r_acc + config.alpha * group.r_tool, group.valid, config.norm_by_std), group)
        for group in groups
    ]


def _gdpo(groups: Sequence[GroupRewards], config: ScoreConfig) -> list[GroupAdvantages]:
    """A_i = s_i / (std of s over the batch + EPSILON), s = A(r_acc) + alpha * A(r_tool), both over the group."""
    sums = []
    for group in groups:
        acc = _channel(group.r_acc, group.valid, config.norm_by_std)
        tool = _channel(group.r_tool, group.valid, config.norm_by_std)
        sums.append(_Channel(acc.values + config.alpha * tool.values, acc.signal or (config.alpha > 0 and tool.signal)))
    num_valid = sum(int(group.valid.sum()) for group in groups)
    if config.norm_by_std and any(channel.signal for channel in sums):
        # Each group's sums add up to 0, so the mean over the batch is 0 too. Subtracting its float noise would make the
        # advantages of uniform groups differ from 0.
        std = np.sqrt(sum(float(np.square(channel.values).sum()) for channel in sums) / (num_valid - 1))
        sums = [_Channel(channel.values / (std + EPSILON), channel.signal) for channel in sums]
    return [_one_advantage(channel, group) for channel, group in zip(sums, groups, strict=True)]


_ESTIMATORS: dict[
    Literal["hdpo", "grpo", "coupled", "gdpo"], Callable[[Sequence[GroupRewards], ScoreConfig], list[GroupAdvantages]]
] = {"hdpo": _hdpo, "grpo": _grpo, "coupled": _coupled, "gdpo": _gdpo}


def advantages(groups: Sequence[GroupRewards], config: ScoreConfig, reference_noise: bool = False) -> list[GroupAdvantages]:
    """Advantages of a batch, by `config.estimator`.

    Computed in float64, then rounded to float32. Where all rewards that enter a mean are equal, the advantage is exactly 0,
    and whether they are is decided by comparing them. A rollout without a verdict counts in no mean.

    Args:
        groups: one batch; only `gdpo` relates its groups to each other.
        config: estimator, alpha, norm_by_std.
        reference_noise: reproduce the HDPO of the public recipe bit for bit, in float32, with the noise that it leaves in
            uniform groups; for parity runs only.
    """
    if reference_noise:
        return [_reference_hdpo(group, config.norm_by_std) for group in groups]
    return _ESTIMATORS[config.estimator](groups, config)


def _reference_channel(rewards: Floats, members: Bools, norm_by_std: bool) -> npt.NDArray[np.float32]:
    values = np.zeros(len(rewards), dtype=np.float32)
    scores = torch.tensor(rewards[members], dtype=torch.float32)
    if len(scores) == 0:
        return values
    alone = len(scores) == 1
    mean = torch.tensor(0.0) if alone else torch.mean(scores)
    std = torch.tensor(1.0) if alone else torch.std(scores)
    values[members] = ((scores - mean) / (std + EPSILON) if norm_by_std else scores - mean).numpy()
    return values


def _reference_hdpo(group: GroupRewards, norm_by_std: bool) -> GroupAdvantages:
    """As the public recipe: no test for uniform groups, a group of one keeps its reward, A_tool != 0 counts tokens."""
    qualifying = group.valid & group.correct
    if qualifying.sum() < 2:
        qualifying = np.zeros_like(qualifying)
    adv_tool = _reference_channel(group.r_tool, qualifying, norm_by_std)
    return GroupAdvantages(
        adv_acc=_reference_channel(group.r_acc, group.valid, norm_by_std),
        adv_tool=adv_tool,
        in_tool_denominator=adv_tool != 0,
        needs_gradient=group.valid.copy(),
    )
