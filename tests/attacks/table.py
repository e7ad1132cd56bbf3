"""All attacks and controls, in the order in which the demo shows them."""

from __future__ import annotations

from vtlab_attacks import control_registers, controls, execution, kernel_memory, processor_tables, secure_memory
from vtlab_attacks.evidence import Attack, Control

ATTACKS: list[Attack] = [
    *control_registers.ATTACKS,
    *processor_tables.ATTACKS,
    *kernel_memory.ATTACKS,
    *execution.ATTACKS,
    *secure_memory.ATTACKS,
]
CONTROLS: list[Control] = controls.CONTROLS
