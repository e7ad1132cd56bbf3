"""Errors: what they say, and that each survives the trip through a status."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from vtlab import errors, status


def subclasses(kind: type[errors.VtlabError]) -> set[type[errors.VtlabError]]:
    return {kind} | {below for child in kind.__subclasses__() for below in subclasses(child)}


ALL_TYPES = sorted(
    (kind for kind in subclasses(errors.VtlabError) - {errors.VtlabError} if kind.__module__ == errors.__name__),
    key=lambda kind: kind.__name__,
)


class FailedCall(grpc.RpcError):
    """A failed call as a stub raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        super().__init__()
        self._values = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:  # type: ignore[override]
        return self._values[2]


def over_the_wire(error: errors.VtlabError) -> errors.VtlabError:
    made = rpc_status.to_status(status.to_status(error))
    return status.from_rpc_error(FailedCall(made.code, made.details, made.trailing_metadata), "vmm")


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.__name__)
def test_each_type_has_a_row_and_comes_back_as_itself(kind: type[errors.VtlabError]) -> None:
    assert kind in status.TABLE
    error = kind.from_fields({"subject": "image 'x'", "detail": "bad", "line": "7", "key": "a.b", "gpa": "4096"})
    back = over_the_wire(error)
    assert type(back) is kind
    assert back.fields() == error.fields()
    assert str(back) == str(error)


def test_reasons_are_unique() -> None:
    assert len(status.TYPE_OF_REASON) == len(status.TABLE)


@given(st.text(max_size=80), st.text(max_size=80), st.integers(0, 2**32 - 1), st.text(max_size=30))
def test_any_text_survives(subject: str, detail: str, line: int, key: str) -> None:
    error = errors.BadPolicy(subject, detail, line=line, key=key)
    back = over_the_wire(error)
    assert isinstance(back, errors.BadPolicy)
    assert (back.subject, back.detail, back.line, back.key) == (subject, detail, line, key)
    assert "\n" not in str(back)


def test_line_names_the_thing_at_fault() -> None:
    policy = errors.BadPolicy("guard.yaml", "no such section\n.txet", line=12, key="memory.0.section")
    assert str(policy) == "guard.yaml:12: memory.0.section: no such section .txet"
    state = errors.WrongState("machine 'a'", state="RUNNING", operation="start")
    assert str(state) == "machine 'a': cannot start while RUNNING"


def test_errors_cross_processes() -> None:
    error = errors.Refused("vm 'a'", "page is sealed", rule="text", gpa=0x100000)
    back = pickle.loads(pickle.dumps(error))
    assert isinstance(back, errors.Refused)
    assert back.fields() == error.fields()


def test_hostile_fields_do_not_break_the_caller() -> None:
    error = errors.BadPolicy.from_fields({"line": "not a number", "surprise": "x"})
    assert (error.line, error.key, error.subject) == (0, "", "")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.PeerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.TimedOut),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_a_bare_status_names_the_peer(code: grpc.StatusCode, kind: type[errors.VtlabError]) -> None:
    error = status.from_rpc_error(FailedCall(code, "went away"), "guest at unix:/x")
    assert type(error) is kind
    assert str(error) == "guest at unix:/x: went away"


def test_details_of_another_domain_are_not_believed() -> None:
    foreign = status.to_status(errors.NotFound("machine 'a'", "no such machine"))
    del foreign.details[:]
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="WRONG_STATE", domain="example.org"))
    made = rpc_status.to_status(foreign)
    error = status.from_rpc_error(FailedCall(made.code, made.details, made.trailing_metadata), "vmm")
    assert type(error) is errors.InternalError


def test_a_subclass_travels_as_its_base() -> None:
    class WrongElf(errors.BadImage):
        pass

    assert type(over_the_wire(WrongElf("a.elf", "e_machine is 3"))) is errors.BadImage


def test_what_cannot_travel_is_clipped_or_escaped() -> None:
    back = over_the_wire(errors.BadImage("guest\udcff.elf", "x" * 100_000))
    assert back.subject == "guest\\udcff.elf"
    assert len(back.detail) == status.FIELD_LIMIT
