"""A level whose channel the VMM closes while threads still speak to it."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from vmm.peers import RemoteLevel
from vtlab.errors import Cancelled
from vtlab.v1.vcpu_pb2 import AttachRequest, Enter

ACTS: dict[str, Callable[[RemoteLevel], object]] = {
    "enter": lambda level: level.enter(Enter(vp_index=0, sequence=1)),
    "drive": lambda level: level.drive(Enter(vp_index=0, sequence=1), lambda _exit: None),
    "attach": lambda level: level.attach(AttachRequest(vm="a", generation=1)),
    "reconnect": lambda level: level.reconnect(AttachRequest(vm="a", generation=1)),
    "state": lambda level: level.state(0),
    "listen": lambda level: level.listen(lambda _vp, _after: None),
}


@pytest.fixture
def level() -> RemoteLevel:
    channel = grpc.insecure_channel("unix:/nobody/listens/here")
    level = RemoteLevel(channel, 0, "guest")
    channel.close()
    return level


@pytest.mark.parametrize("act", ACTS)
def test_whoever_speaks_to_it_is_cancelled(level: RemoteLevel, act: str) -> None:
    with pytest.raises(Cancelled, match="the channel to it was closed"):
        ACTS[act](level)


def test_nothing_runs_there_that_could_be_kicked(level: RemoteLevel) -> None:
    assert not level.kick(0, 1)
