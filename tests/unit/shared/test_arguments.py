"""The command line of the servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.arguments import run_server, server_config
from vtlab.channels import ServerConfig
from vtlab.errors import PeerUnavailable

COMMON = ["--listen", "unix:/a", "--listen", "127.0.0.1:0", "--trust", "/t", "--state", "/s"]
LEVEL = [*COMMON, "--memory", "/m"]


def test_vmm() -> None:
    config = server_config("vmm", [*COMMON, "--guest", "unix:/g", "--monitor", "unix:/m"])
    assert config == ServerConfig(
        ("unix:/a", "127.0.0.1:0"),
        Path("/t"),
        "vmm",
        Path("/s"),
        guest="unix:/g",
        monitor="unix:/m",
        memory=Path("/s"),
    )


def test_a_level_is_told_where_memory_lies() -> None:
    assert server_config("monitor", LEVEL).memory == Path("/m")


def test_any_address_is_off_unless_asked_for() -> None:
    assert not server_config("guest", LEVEL).allow_any_address
    assert server_config("guest", [*LEVEL, "--any-address"]).allow_any_address


@pytest.mark.parametrize("arguments", [COMMON, LEVEL[:4], [*LEVEL, "--guest", "unix:/g"]])
def test_what_is_missing_or_unknown_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server_config("monitor", arguments)
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: ServerConfig) -> None:
        raise PeerUnavailable("trust folder /t", "is not there")

    monkeypatch.setenv("VTLAB_CONFINEMENT", "off")  # or it would be this process that is confined
    monkeypatch.setattr("sys.argv", ["guest", *LEVEL])
    assert run_server("guest", main) == 1
    assert capsys.readouterr().err == "guest: trust folder /t: is not there\n"
