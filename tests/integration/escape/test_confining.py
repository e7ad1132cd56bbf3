"""What confinement says and does where something is missing, where a debugger is wanted, and with a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.cli import checks
from vmm.launcher import launch
from vtlab.confinement import bpf, landlock
from vtlab.confinement.confine import VARIABLE
from vtlab.errors import BadArgument

TREE = Path(__file__).parents[3]
# A server of the role in the first argument, as far as confinement goes.
SCRIPT = """
import sys
from pathlib import Path
from vtlab.channels import ServerConfig
from vtlab.confinement import bpf, confine, landlock
from vtlab.errors import VtlabError
from vtlab.ram import create_stores
role, folder, missing = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
create_stores(folder)
if "landlock" in missing:
    confine.landlock.restrict = lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented"))
if "old" in missing:
    confine.landlock.restrict = lambda *_: 3
if "seccomp" in missing:
    confine.bpf.available = lambda: False
try:
    held = confine.confine(ServerConfig((), folder, role, folder, memory=folder))
except VtlabError as error:
    print("refused:", error)
    sys.exit(1)
print(held)
"""


def confined(role: str, folder: Path, missing: str, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, role, str(folder), missing]
    environment = os.environ | {VARIABLE: mode}
    return subprocess.run(command, env=environment, cwd=TREE, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("role", ["guest", "monitor", "vmm"])
@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("landlock", "no Landlock: Function not implemented"),
        ("seccomp", "no seccomp: this kernel takes no filter"),
        ("old", "Landlock 3 of this kernel keeps files, truncation alone"),
    ],
)
def test_what_is_missing_is_said_or_ends_it(tmp_path: Path, role: str, missing: str, said: str) -> None:
    done = confined(role, tmp_path, missing, "")
    assert done.returncode == 0, done.stderr
    assert f"{role}: not confined: {said}" in done.stderr
    done = confined(role, tmp_path, missing, "required")
    assert done.returncode == 1
    assert f"refused: confinement of the {role}: VTLAB_CONFINEMENT requires it: " in done.stdout
    assert said in done.stdout


def test_a_value_that_means_nothing_is_no_laboratory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "of")
    with pytest.raises(BadArgument, match="'of' is neither"), launch(directory=tmp_path):
        pytest.fail("it started")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "filters", "mode", "level", "words"),
    [
        (7, True, "", checks.Level.OK, ["Landlock 7 (files, truncation, TCP ports, signals)", "Landlock tells"]),
        (3, True, "", checks.Level.WARNING, ["Landlock 3 (files, truncation)", "Landlock tells their files apart"]),
        (0, True, "", checks.Level.WARNING, ["no Landlock", "nothing tells their files apart"]),
        (7, False, "", checks.Level.WARNING, ["no seccomp"]),
        (0, False, "required", checks.Level.FAILURE, ["no Landlock", "no seccomp"]),
        (7, True, "off", checks.Level.WARNING, ["VTLAB_CONFINEMENT=off"]),
        (7, True, "maybe", checks.Level.FAILURE, ["'maybe'"]),
    ],
)
def test_doctor(
    monkeypatch: pytest.MonkeyPatch, version: int, filters: bool, mode: str, level: checks.Level, words: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, mode)
    monkeypatch.setattr(landlock, "abi", lambda: version)
    monkeypatch.setattr(bpf, "available", lambda: filters)
    found = checks.confinement()
    assert found.level is level
    assert [word for word in words if word not in found.detail] == []
    assert bool(found.fix) is (level is not checks.Level.OK)


# Types a letter into the terminal that is its standard input, with and without the guest's filter.
TYPING = """
import fcntl, os, sys
from vtlab.confinement import bpf, privileges
from vtlab.confinement.calls import allowed_calls
from vtlab.trust.roles import Role
if sys.argv[1] == "filtered":
    privileges.no_new_privileges()
    bpf.install(bpf.assemble(allowed_calls(Role.GUEST, os.getpid(), False)))
try:
    fcntl.ioctl(0, 0x5412, b"x")
    print("typed")
except OSError as error:
    print(error.strerror)
"""


def test_nothing_is_typed_into_an_inherited_terminal() -> None:
    """TIOCSTI: what is typed so, the user's shell reads."""
    if not bpf.available():
        pytest.skip("no seccomp filter")
    said = {}
    for how in ("free", "filtered"):
        ours, theirs = pty.openpty()
        try:
            done = subprocess.run(
                [sys.executable, "-c", TYPING, how],
                stdin=theirs,
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            said[how] = done.stdout.strip()
        finally:
            os.close(ours)
            os.close(theirs)
    assert said["filtered"] == "Operation not permitted"
    if said["free"] != "typed":
        pytest.skip(f"this kernel refuses it to all: {said['free']}")
