"""What a run and its ranks send each other leaves nothing behind that could hurt."""

from __future__ import annotations

import subprocess
import sys

import pytest

UNSENT = """
import gc, socket, sys
from multiprocessing.connection import Connection
import torch
from metis_fast.train.megatron.wire import Channel, Kind, pack

def send(value):
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        Channel(Connection(ours.detach())).send(Kind.CALL, 1, value)
    except OSError as error:
        cycle = [error]  # in a local of a frame in its traceback

gc.disable()
for _ in range(5):
    send({"tensor": torch.zeros(1000), "packed": pack(b"x" * 1000)}[sys.argv[1]])
gc.collect()
"""


@pytest.mark.parametrize("value", ["tensor", "packed"])
def test_a_message_that_could_not_be_sent_does_not_crash_who_collects_it(value: str) -> None:
    ended = subprocess.run([sys.executable, "-c", UNSENT, value], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
