"""Logs: a JSON object a line with the machine it is about, and a bound on what repeats itself."""

from __future__ import annotations

import json
import logging

import pytest

from vtlab import logs


@pytest.fixture(params=["json", "text"])
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> logging.Handler:
    """The handler that a process of role vmm would have."""
    kept: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: kept.extend(given["handlers"]))
    logs.configure("vmm", request.param)
    return kept[0]


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("vmm.machine", logging.WARNING, __file__, 1, message, arguments, None)
    made.__dict__.update(fields)
    return made


def test_a_line_names_machine_vcpu_and_number(said: logging.Handler) -> None:
    line = said.format(record("machine %s breaks", "a\nb", vm="a", vp=1, sequence=7))
    if line.startswith("{"):
        found = json.loads(line)
        assert (found["vm"], found["vp"], found["sequence"]) == ("a", 1, 7)
        assert (found["role"], found["level"], found["message"]) == ("vmm", "WARNING", "machine a\nb breaks")
        assert "vtl" not in found
        assert "\n" not in line
    else:
        assert line.endswith("[vm=a vp=1 sequence=7]")


def test_what_repeats_itself_is_cut_off_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("vtlab.logs.time.monotonic", lambda: now)
    limit = logs.RateLimit(burst=3, rate=1)
    passed = [limit.filter(record("machine %s", number)) for number in range(10)]
    assert passed == [True] * 3 + [False] * 7
    assert limit.filter(record("another"))
    now = 1.0
    last = record("machine %s", 10)
    assert limit.filter(last)
    assert last.getMessage() == "machine 10 (and 7 times more, left out)"
    assert not limit.filter(record("machine %s", 11))
