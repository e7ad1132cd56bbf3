"""All attacks and controls, in the order in which the demo shows them."""

from __future__ import annotations

from vtlab_attacks import (
    boots,
    control_registers,
    controls,
    execution,
    hardware,
    hibernation,
    kernel_memory,
    kexec,
    pins,
    processor_tables,
    requests,
    resets,
    secure_memory,
    sleep,
    smm,
    startups,
    upgrades,
)
from vtlab_attacks.evidence import Attack, Control, Transition

ATTACKS: list[Attack] = [
    *control_registers.ATTACKS,
    *processor_tables.ATTACKS,
    *kernel_memory.ATTACKS,
    *execution.ATTACKS,
    *secure_memory.ATTACKS,
]
CONTROLS: list[Control] = controls.CONTROLS
# What may come before an attack, and the attacks on it. The demo leaves them out.
TRANSITIONS: list[Transition] = [
    *resets.TRANSITIONS,
    *smm.TRANSITIONS,
    *sleep.TRANSITIONS,
    *hibernation.TRANSITIONS,
    *hardware.TRANSITIONS,
    *kexec.TRANSITIONS,
    *upgrades.TRANSITIONS,
    *startups.TRANSITIONS,
]
TRANSITION_ATTACKS: list[Attack] = [
    *resets.TRANSITION_ATTACKS,
    *smm.TRANSITION_ATTACKS,
    *sleep.TRANSITION_ATTACKS,
    *hibernation.TRANSITION_ATTACKS,
    *hardware.TRANSITION_ATTACKS,
    *kexec.TRANSITION_ATTACKS,
    *requests.TRANSITION_ATTACKS,
    *startups.TRANSITION_ATTACKS,
    *upgrades.TRANSITION_ATTACKS,
    *boots.TRANSITION_ATTACKS,
    *pins.TRANSITION_ATTACKS,
]
