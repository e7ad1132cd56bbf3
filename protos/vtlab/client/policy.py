"""The policies of a laboratory's machines, as their operator sees them."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from vtlab.client.calls import repeated, stream
from vtlab.v1 import monitor_pb2, monitor_pb2_grpc


class Policy:
    """MonitorService, typed. `vm` is a machine's name or anything whose str() is it."""

    def __init__(self, channel: grpc.Channel, peer: str) -> None:
        self._stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        self._peer = peer

    def get(self, vm: object) -> monitor_pb2.PolicyStatus:
        """The policy in force. Raises NotFound."""
        return repeated(self._peer, self._stub.GetPolicy, monitor_pb2.GetPolicyRequest(vm=str(vm))).policy

    def set(self, vm: object, text: str, file_name: str = "") -> monitor_pb2.PolicyStatus:
        """Overrides the guest's own policy. Raises BadPolicy with line and key, WrongState once locked."""
        request = monitor_pb2.SetPolicyRequest(vm=str(vm), text=text, file_name=file_name)
        return repeated(self._peer, self._stub.SetPolicy, request).policy

    def lock(self, vm: object) -> monitor_pb2.PolicyStatus:
        """Makes it final until the machine is reset."""
        return repeated(self._peer, self._stub.LockPolicy, monitor_pb2.LockPolicyRequest(vm=str(vm))).policy

    def check(self, text: str, vm: object = "", file_name: str = "") -> monitor_pb2.CheckPolicyResponse:
        """All problems of a policy, against a machine's image if one is named; changes nothing."""
        request = monitor_pb2.CheckPolicyRequest(vm=str(vm), text=text, file_name=file_name)
        return repeated(self._peer, self._stub.CheckPolicy, request)

    def quote(self, vm: object, nonce: bytes) -> monitor_pb2.SignedQuote:
        """What VTL1 holds, signed (vtlab.attestation). Raises NotFound, BadArgument, Unsupported without a key."""
        request = monitor_pb2.GetQuoteRequest(vm=str(vm), nonce=nonce)
        return repeated(self._peer, self._stub.GetQuote, request).quote

    def verdicts(self, vm: object) -> Iterator[monitor_pb2.WatchVerdictsResponse]:
        """Verdicts as they fall, until the iterator is closed."""
        return stream(self._peer, self._stub.WatchVerdicts, monitor_pb2.WatchVerdictsRequest(vm=str(vm)))

    def verdicts_so_far(self, vm: object) -> list[monitor_pb2.WatchVerdictsResponse]:
        """Verdicts that have fallen already, oldest first."""
        request = monitor_pb2.WatchVerdictsRequest(vm=str(vm), until_now=True)
        return list(stream(self._peer, self._stub.WatchVerdicts, request))
