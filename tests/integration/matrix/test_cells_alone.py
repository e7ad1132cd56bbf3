"""A laboratory that is used again: what one cell did is nowhere when the next machine is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm.launcher import LocalLab, launch
from vtlab.client import Lab, Machine
from vtlab.errors import NotFound
from vtlab.v1 import vmm_pb2
from vtlab_attacks.guest import RAM, Guest, boot, kernel_symbols, modules
from vtlab_attacks.table import ATTACKS, CONTROLS, TRANSITIONS

NAME = "the-same-name"
# The time, which goes on, and the frequency of its counter, which the host measures better and better.
CLOCKS = (0x10, 0x40000022)
MEMORY = ("ram.rw", "ram.ro", "private")


@pytest.fixture(scope="module")
def fresh() -> Iterator[LocalLab]:
    """Three processes that served no machine yet."""
    with launch() as lab:
        yield lab


def created(lab: Lab) -> Machine:
    symbols = kernel_symbols()
    return lab.create(
        symbols.image, name=NAME, ram=RAM, vp_count=2, command_line="protect=vtl", modules=modules(), design="vtl"
    )


def state(lab: LocalLab, machine: Machine) -> dict[str, Any]:
    """All that an attack could have left: memory files, vCPUs, what both levels and the monitor hold, the event log."""
    folder = next(lab.directory.glob(f"**/{NAME}"))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    assert set(MEMORY) <= set(files)
    vps: list[dict[Any, Any]] = []
    for index in range(2):
        one = machine.registers(index)
        msrs = {msr.index: msr.value for msr in one.msrs if msr.index not in CLOCKS}
        del one.msrs[:]
        vps.append(msrs | {"registers": str(one)})
    policy = lab.policy.get(machine)
    events = list(machine.events(until_now=True))
    info = machine.info()
    return {
        "files": files,
        "vps": vps,
        "policy": str(policy),
        "verdicts": lab.policy.verdicts_so_far(machine),
        "events": [(event.kind, event.state.state) for event in events],
        "serial": [machine.serial(port) for port in (0, 1)],
        "generation": info.generation,
        "vtl1": info.vtl1_enabled,
        "machines": [one.vm for one in lab.machines()],
        "rights": str(machine.translate(kernel_symbols().physical("text_start")).access),
        "children": sorted(path.name for path in lab.directory.iterdir()),
    }


def misuse(guest: Guest) -> None:
    """As much as one machine takes: transitions, then attacks and legitimate operations."""
    for transition in TRANSITIONS:
        if transition.vp_count == 1:
            guest, _ = transition.run(guest)
    for control in CONTROLS:
        control.run(guest.machine, guest.driver, guest.symbols)
    for attack in ATTACKS:
        attack.run(guest.machine, guest.driver, guest.symbols)


def test_nothing_is_left_behind(fresh: LocalLab) -> None:
    with created(fresh) as machine:
        expected = state(fresh, machine)
        assert expected["generation"] == 1
    with boot(fresh, True) as guest:
        used = guest.machine
        folder = next(fresh.directory.glob(f"**/{used.name}"))
        misuse(guest)
        marked = state_changed(folder)
    assert marked
    assert not folder.exists()
    with pytest.raises(NotFound):
        fresh.policy.get(used.name)
    with pytest.raises(NotFound):
        fresh.machine(used.name)
    with boot(fresh, False) as guest:  # the other way round too: what an unguarded machine let happen
        for attack in ATTACKS[:8]:
            attack.run(guest.machine, guest.driver, guest.symbols)
    with created(fresh) as machine:
        assert state(fresh, machine) == expected
        machine.start()
        machine.wait_serial("selfguard: ready", timeout=30)
        assert fresh.policy.get(machine).locked


def state_changed(folder: Path) -> bool:
    """Whether all three memory files hold something now, so that their emptiness afterwards says something."""
    return all(any((folder / name).read_bytes()) for name in MEMORY)


def test_the_event_log_begins_with_its_own_machine(fresh: LocalLab) -> None:
    for _ in range(2):
        with created(fresh) as machine:
            (event,) = machine.events(until_now=True)
            assert event.state.state == vmm_pb2.MACHINE_STATE_CREATED
