"""placeholder"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupAdvantage:
    """placeholder"""


def group_advantage() -> None:
    """placeholder"""
