"""The cluster keeps its promises on paper, and the example policies are policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vtl1_monitor.policy.text import parse
from vtlab.arguments import server_config

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].startswith("vtlab-")
    assert "privileged" not in service
    assert "cap_add" not in service


def test_only_client_ports_are_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"vmm", "monitor"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_the_guest_has_no_network() -> None:
    assert SERVICES["guest"]["network_mode"] == "none"
    assert COMPOSE["networks"]["lab"]["internal"] is True


def test_each_role_sees_its_own_key_and_only_three_see_memory() -> None:
    mounts = {name: {volume.split(":")[0] for volume in service["volumes"]} for name, service in SERVICES.items()}
    for role in ("vmm", "guest", "monitor", "operator"):
        users = {name for name, volumes in mounts.items() if f"trust-{role}" in volumes}
        assert users == {"trust", "demo" if role == "operator" else role}
    assert {name for name, volumes in mounts.items() if "memory" in volumes} == {"vmm", "guest", "monitor"}


@pytest.mark.parametrize("policy", sorted((ROOT / "deploy/policies").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_policies_parse(policy: Path) -> None:
    assert parse(policy.read_text(), policy.name).model.name == policy.stem


@pytest.mark.parametrize("name", ["guest", "monitor", "vmm"])
def test_the_command_lines_are_those_of_the_servers(name: str) -> None:
    """And each has a user of its own."""
    command = SERVICES[name]["command"]
    config = server_config(name, command[2:])
    assert config.role == name
    assert config.memory == Path("/memory")
    assert SERVICES[name]["user"] == f"vtlab-{name}"
    assert "VTLAB_CONFINEMENT" in SERVICES[name]["environment"]
