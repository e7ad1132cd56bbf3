"""A laboratory whose logs, metrics and traces are looked at: one guest under protection, attacked a few times."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vmm.launcher import launch
from vtlab.errors import BadArgument
from vtlab.metrics import Endpoint
from vtlab.services import Service
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS

ATTACKED = [attack for attack in ATTACKS if attack.name in ("cr0-wp", "msr-lstar", "text-write")]


class Seen(NamedTuple):
    vm: str
    logs: dict[str, str]
    metrics: dict[str, dict[str, float]]
    traces: dict[str, list[dict[str, Any]]]


def _metrics(log: str) -> dict[str, float]:
    """Sample -> value, from where the log says they are."""
    found = re.search(r"http://\S+/metrics", log)
    assert found
    with urllib.request.urlopen(found[0], timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("traces")
    any_port = ("127.0.0.1:0", "127.0.0.1:0")
    with launch(log_format="json", metrics=any_port, traces=str(folder)) as lab, boot(lab, protected=True) as guest:
        for attack in ATTACKED:
            attack.run(guest.machine, guest.driver, guest.symbols)
        guest.driver.vtl(Service.PING)
        logs = {role: (lab.directory / f"{role}.log").read_text() for role in ("vmm", "monitor", "guest")}
        metrics = {role: _metrics(logs[role]) for role in ("vmm", "monitor")}
        name = guest.machine.name
    traces: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            span = json.loads(line)
            traces[span["context"]["trace_id"]].append(span | {"role": file.stem})
    return Seen(name, logs, metrics, traces)


def test_every_line_of_a_log_is_an_object_that_names_its_machine(seen: Seen) -> None:
    lines = [json.loads(line) for line in seen.logs["vmm"].splitlines()]
    states = [line for line in lines if line.get("vm") == seen.vm]
    assert any("is RUNNING, generation 1" in line["message"] for line in states)
    assert all(line["role"] == "vmm" and line["time"] for line in lines)


def test_metrics_say_what_the_machine_did(seen: Seen) -> None:
    vmm, monitor = seen.metrics["vmm"], seen.metrics["monitor"]
    assert vmm[f'vtlab_machine_state{{state="running",vm="{seen.vm}"}}'] == 1
    assert vmm[f'vtlab_exits_total{{reason="register_write",vm="{seen.vm}"}}'] >= 1
    assert vmm[f'vtlab_enters{{vm="{seen.vm}",vp="0",vtl="1"}}'] >= len(ATTACKED)
    assert vmm[f'vtlab_pages{{store="sealed",vm="{seen.vm}"}}'] > 0
    assert vmm[f'vtlab_event_readers{{vm="{seen.vm}"}}'] == 1
    assert vmm["vtlab_journal_transactions_total"] > 0
    denied = {name: value for name, value in monitor.items() if 'action="deny"' in name}
    assert sum(denied.values()) >= len(ATTACKED)
    assert monitor[f'vtlab_policy_locked{{vm="{seen.vm}"}}'] == 1


def test_a_vtl_switch_is_one_trace_over_three_processes(seen: Seen) -> None:
    calls = seen.metrics["vmm"][f'vtlab_events_total{{kind="verdict",vm="{seen.vm}"}}']
    assert len(seen.traces) >= calls
    for spans in seen.traces.values():
        assert {span["role"] for span in spans} == {"vmm", "monitor", "guest"}
        (root,) = (span for span in spans if span["parent_id"] is None)
        assert root["role"] == "vmm"
        assert root["attributes"]["vtlab.vm"] == seen.vm
        assert {span["parent_id"] for span in spans if span is not root} == {root["context"]["span_id"]}
    actions = [span["attributes"].get("vtlab.action") for spans in seen.traces.values() for span in spans]
    assert actions.count("ACTION_DENY") >= len(ATTACKED)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "unix:/x", "127.0.0.1", "127.0.0.1:99999"])
def test_metrics_are_on_loopback_alone(address: str) -> None:
    with pytest.raises(BadArgument, match=r"address|metrics"):
        Endpoint(address, list)


def test_a_port_that_is_taken_is_named() -> None:
    first = Endpoint("127.0.0.1:0", list)
    try:
        with pytest.raises(BadArgument, match=re.escape(first.address)):
            Endpoint(first.address, list)
    finally:
        first.close()


def test_traces_to_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="traces"), launch(traces=str(tmp_path / "no" / "such" / "folder")):
        pass
