"""A second lock on what namespaces keep away: landlock(7), where the kernel has it.

A session may write below its scratch folder and to devices only, reach no TCP port, and, from Linux 6.12 on, send no signal and
connect to no abstract socket of a process outside of itself.
"""

from __future__ import annotations

import errno
import os
import struct

from metis_fast.tools.sandbox.libc import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION = 1  # flag of the first
_PATH_BENEATH = 1
_LEAST = 2  # with version 1 no file could be moved from one folder to another
# landlock_ruleset_attr: everything that changes files, by the version that brought it
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 14))  # remove and make of every kind, refer
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract sockets, signals


def version() -> int:
    """Of the kernel's landlock; 0 where it has none that is of use here."""
    try:
        found = syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, _VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):  # not built, not booted, forbidden by a filter
            return 0
        raise
    return found if found >= _LEAST else 0


def restrict(found: int, scratch: str) -> None:
    """Restrict this process and all that it starts, for good. It needs no_new_privs. found: from `version`."""
    changes = _CHANGES | (_TRUNCATE if found >= 3 else 0)
    attributes = struct.pack("=QQQ", changes, _TCP if found >= 4 else 0, _SCOPES if found >= 6 else 0)
    size = 8 if found < 4 else 16 if found < 6 else 24
    rules = syscall("landlock_create_ruleset", _CREATE_RULESET, attributes[:size], size, 0)
    try:
        for path, allowed in ((scratch, changes), ("/dev", changes & (_WRITE_FILE | _TRUNCATE))):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", allowed, folder)
                syscall("landlock_add_rule", _ADD_RULE, rules, _PATH_BENEATH, rule, 0)
            finally:
                os.close(folder)
        syscall("landlock_restrict_self", _RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
