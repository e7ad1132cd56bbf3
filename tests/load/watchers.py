"""Clients of event streams, each with a TLS connection of its own, and what each of them saw.

`python -m tests.load.watchers` reads a JSON list of {"vmm", "trust", "vm", "clients", "slow"} from stdin, says "ready"
when every client has its first event, and stops and prints its findings when stdin closes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from vtlab.channels import MAX_MESSAGE
from vtlab.client.serial import events_of
from vtlab.trust.certificates import load_credentials, server_name
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2

_WATCH = "/vtlab.v1.VmmService/WatchEvents"
# Seconds that a slow client needs for one answer.
_SLOWNESS = 0.25


@dataclass
class Seen:
    """What one client saw. Numbers of events count all kinds, so a gap is an event that did not come.

    Attributes:
        events: that came.
        gaps: numbers between them that did not.
        told: how many the server said were lost.
        backwards: numbers that were not above the one before.
        error: why the stream ended early; empty if it did not.
    """

    vm: str = ""
    slow: bool = False
    events: int = 0
    gaps: int = 0
    told: int = 0
    backwards: int = 0
    last: int = 0
    error: str = ""

    def take(self, event: vmm_pb2.Event) -> None:
        if event.kind == vmm_pb2.EVENT_KIND_LOST:
            self.told += event.lost.count
            return
        self.events += 1
        self.backwards += event.sequence <= self.last
        self.gaps += max(0, event.sequence - self.last - 1)
        self.last = event.sequence

    @property
    def silent(self) -> int:
        """Events that were lost without a word. A loss is told before the events around it, so `told` may run ahead."""
        return max(0, self.gaps - self.told)


async def _client(lab: dict[str, Any], seen: Seen, started: asyncio.Semaphore) -> None:
    own = load_credentials(Path(lab["trust"]), Role.OPERATOR)
    credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
    options = [
        ("grpc.ssl_target_name_override", server_name(Role.VMM)),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
        ("grpc.max_receive_message_length", MAX_MESSAGE),
    ]
    async with grpc.aio.secure_channel(lab["vmm"], credentials, options=options) as channel:
        watch: Any = channel.unary_stream(
            _WATCH,
            request_serializer=vmm_pb2.WatchEventsRequest.SerializeToString,
            response_deserializer=vmm_pb2.WatchEventsResponse.FromString,
        )
        # From the first event there was, so that everything that does not come has to be told of.
        call = watch(vmm_pb2.WatchEventsRequest(vm=lab["vm"], from_sequence=1, batches=True))
        first = True
        try:
            async for answer in call:
                for event in events_of(answer):
                    seen.take(event)
                if first:
                    started.release()
                    first = False
                if seen.slow:
                    await asyncio.sleep(_SLOWNESS)
            seen.error = "the server ended the stream"
        except grpc.aio.AioRpcError as error:
            seen.error = f"{error.code().name}: {error.details()}"
        finally:
            if first:
                started.release()


async def _main() -> None:
    loop = asyncio.get_running_loop()
    labs = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    started = asyncio.Semaphore(0)
    seen: list[Seen] = []
    tasks = []
    for lab in labs:
        for number in range(lab["clients"]):
            seen.append(Seen(lab["vm"], number < lab["slow"]))
            tasks.append(asyncio.create_task(_client(lab, seen[-1], started)))
            await asyncio.sleep(0.002)
    for _ in tasks:
        await started.acquire()
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps([asdict(one) | {"silent": one.silent} for one in seen]), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
