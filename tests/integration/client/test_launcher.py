"""The launcher with toy servers: three processes come up, and none of them outlives its parent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import tenacity

from vmm import launcher
from vmm.launcher import launch, sweep
from vmm.supervisor import Budget
from vtlab.client import calls, connect
from vtlab.errors import BadImage, InternalError, PeerUnavailable, TimedOut, VtlabError
from vtlab.trust.roles import Role

TREE = Path(__file__).parents[3]
TOYS = dict.fromkeys((Role.VMM, Role.GUEST, Role.MONITOR), "tests.integration.client.toy")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SERVERS", TOYS)
    monkeypatch.setattr(launcher, "AFTER_START", 3600)  # what a test puts into the environment reaches no spare


def is_alive(pid: int) -> bool:
    """True unless it is gone or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@tenacity.retry(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_fixed(0.02), reraise=True)
def gone(pids: list[int], folder: Path) -> None:
    assert [pid for pid in pids if is_alive(pid)] == []
    assert not folder.exists()


def test_three_processes_and_nothing_left(toys: None, tmp_path: Path) -> None:
    with launch(directory=tmp_path) as lab:
        pids = list(lab.pids.values())
        assert len({*pids, os.getpid()}) == 4
        assert all(is_alive(pid) for pid in pids)
        assert lab.directory.stat().st_mode & 0o777 == 0o700
        with lab.create(b"image") as machine:
            machine.start()
            machine.wait_serial("hello")
            assert lab.policy.get(machine).rules == []
    gone(pids, lab.directory)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_ends_them_too(toys: None, tmp_path: Path) -> None:
    seen: list[launcher.LocalLab] = []

    def fail_inside() -> None:
        with launch(directory=tmp_path) as lab:
            seen.append(lab)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    gone(list(seen[0].pids.values()), seen[0].directory)


def test_rules_of_this_test_reach_the_monitor(toys: None, tmp_path: Path) -> None:
    word = "shipped"

    def rule() -> str:
        return f"{word} to {os.getpid()}"

    with launch([rule], directory=tmp_path) as lab:
        assert lab.policy.get("any").rules == [f"shipped to {lab.pids['monitor']}"]


@pytest.mark.parametrize("role", ["vmm", "guest", "monitor"])
@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("refuse", BadImage, "toy: refuses to start"),
        ("break", InternalError, "{role}: KeyError: 'toy'"),
        ("die", InternalError, "{role}: ended with code 7 at start: toy: dying"),
        ("hang", TimedOut, "{role}: did not start in 3 s"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    toys: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    fault: str,
    kind: type[VtlabError],
    text: str,
) -> None:
    monkeypatch.setenv("VTLAB_TEST_FAULT", f"{role}:{fault}")
    with pytest.raises(kind) as failed, launch(directory=tmp_path, timeout=3 if fault == "hang" else 60):
        pytest.fail("it started")
    said = str(failed.value)
    if fault == "hang":  # on a busy machine the others may be late too
        assert role in said
        assert said.endswith(text.format(role=""))
    else:
        assert said == text.format(role=role)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", [Role.VMM, Role.GUEST, Role.MONITOR])
def test_who_dies_is_restarted_at_the_same_address(toys: None, tmp_path: Path, role: Role) -> None:
    with launch(directory=tmp_path, vmm_listen="127.0.0.1:0") as lab:
        before = lab.pids
        os.kill(before[role], signal.SIGKILL)
        assert lab.supervisor.wait_restarted(role, 1, 30)
        assert {name for name, pid in lab.pids.items() if pid != before[name]} == {role}
        assert lab.machines() == []
        assert lab.policy.get("any").rules == []
        pids = list(lab.pids.values())
    gone(pids, lab.directory)


def test_all_three_at_once(toys: None, tmp_path: Path) -> None:
    with launch(directory=tmp_path) as lab:
        for pid in lab.pids.values():
            os.kill(pid, signal.SIGKILL)
        assert all(lab.supervisor.wait_restarted(role, 1, 30) for role in TOYS)
        assert lab.machines() == []


def test_who_dies_again_and_again_ends_the_laboratory(toys: None, tmp_path: Path) -> None:
    with launch(directory=tmp_path, budget=Budget(deaths=3, seconds=1000)) as lab:
        for count in range(3):
            os.kill(lab.pids["monitor"], signal.SIGKILL)
            lab.supervisor.wait_restarted(Role.MONITOR, count + 1, 30)
        failure = lab.supervisor.wait_failure()
        assert re.match(r"monitor: ended 3 times within \d+ s, at last with code -9", str(failure))
        pids = list(lab.pids.values())
    gone(pids, lab.directory)


def test_who_cannot_be_restarted_ends_the_laboratory(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launch(directory=tmp_path) as lab:
        monkeypatch.setenv("VTLAB_TEST_FAULT", "guest:refuse")
        os.kill(lab.pids["guest"], signal.SIGKILL)
        assert "it cannot be restarted: toy: refuses to start" in str(lab.supervisor.wait_failure())


def test_who_is_asked_to_end_is_not_restarted(toys: None, tmp_path: Path) -> None:
    with launch(directory=tmp_path) as lab:
        os.kill(lab.pids["guest"], signal.SIGTERM)
        assert str(lab.supervisor.wait_failure()).startswith("guest: ended with code 0")


def test_a_vmm_that_is_gone_is_an_error_of_the_caller(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "RESTART_BUDGET", 0.5)
    with launch(directory=tmp_path, budget=Budget(deaths=1)) as lab:
        machine = lab.create(b"image")
        machine.start()
        os.kill(lab.pids["vmm"], signal.SIGKILL)
        with pytest.raises(PeerUnavailable, match="vmm at unix:"):
            machine.wait_serial("never", timeout=30)
    gone(list(lab.pids.values()), lab.directory)


def test_a_long_path_is_no_obstacle(toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of Unix sockets are short; the folder of a laboratory need not be."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    with tempfile.TemporaryDirectory(dir=launcher.SHORT_BASE) as short:
        monkeypatch.setattr(launcher, "SHORT_BASE", short)
        with launch(directory=long) as lab:
            assert lab.directory.parent == long
            assert lab.addresses.vmm.startswith(f"unix:{short}/")
            assert lab.machines() == []
        assert list(long.iterdir()) == list(Path(short).iterdir()) == []


def test_tcp_for_clients(toys: None, tmp_path: Path) -> None:
    with launch(directory=tmp_path, vmm_listen="127.0.0.1:0", monitor_listen="127.0.0.1:0") as lab:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", lab.addresses.vmm)
        other = connect(lab.addresses.vmm, lab.addresses.monitor, lab.addresses.trust)
        assert other.policy.get("a").rules == []
        other.close()


def test_from_a_thread_that_ends(toys: None, tmp_path: Path) -> None:
    """The end of the thread that started a laboratory is not its end, as the kernel's death signal would have it."""
    context = launch(directory=tmp_path)
    labs: list[launcher.LocalLab] = []
    thread = threading.Thread(target=lambda: labs.append(context.__enter__()))
    thread.start()
    thread.join()
    assert labs[0].machines() == []
    context.__exit__(None, None, None)
    gone(list(labs[0].pids.values()), labs[0].directory)


SCRIPT = """
    import os, signal, sys
    from vmm import launcher
    launcher.SERVERS = dict.fromkeys(launcher.SERVERS, "tests.integration.client.toy")
    print("main", flush=True)
    def rule():
        return "of a script"
    with launcher.launch([rule], directory=sys.argv[1]) as lab:
        print(lab.policy.get("a").rules[0], flush=True)
        print(*lab.pids.values(), lab.directory, flush=True)
        {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os._exit(3)", 3),
        ("sys.exit(4)", 4),
    ],
)
def test_an_unguarded_script_and_its_death(tmp_path: Path, end: str, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(end=end))
    folder = tmp_path / "labs"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["main", "of a script"], "the script ran once, in the parent alone"
    *pids, directory = lines[2].split()
    gone([int(pid) for pid in pids], Path(directory))
    assert done.stderr == ""


def test_ctrl_c_is_the_parents(tmp_path: Path) -> None:
    """A terminal sends SIGINT to all; the servers leave it to their parent, which then drains them."""
    script = tmp_path / "script.py"
    end = "os.killpg(os.getpgid(0), signal.SIGINT); signal.pause()"
    script.write_text(textwrap.dedent(SCRIPT).format(end=end))
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
        timeout=50,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr.splitlines()[-1]
    *pids, directory = done.stdout.splitlines()[2].split()
    gone([int(pid) for pid in pids], Path(directory))


def test_folders_of_the_dead_are_swept(toys: None, tmp_path: Path) -> None:
    dead, young = tmp_path / f"{launcher.PREFIX}dead", tmp_path / f"{launcher.PREFIX}young"
    for folder in (dead, young):
        folder.mkdir(mode=0o700)
    os.utime(dead, (0, 0))
    with launch(directory=tmp_path) as lab:
        assert not dead.exists()
        os.utime(lab.directory, (0, 0))
        assert sweep(tmp_path) == []
        assert lab.machines() == []
    assert list(tmp_path.iterdir()) == [young]
