"""The one profiler of torch that we use."""

from __future__ import annotations

import os

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile


def profiler() -> profile:
    """Of the ops of all threads (the update of a run that samples meanwhile is in one of its own), and of kernels where there
    are GPUs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to stderr when it begins and ends
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
