"""The limit on open files, which is often 1,024 where many more are allowed."""

from __future__ import annotations

import resource


def allow_files(wanted: int) -> None:
    """Raise this process's soft limit to `wanted`, as far as the hard one allows; a higher one stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
