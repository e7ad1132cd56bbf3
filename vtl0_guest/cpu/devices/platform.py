"""Builds the devices of one machine and wires them."""

from __future__ import annotations

from vtl0_guest.cpu.devices import (
    debug_exit,
    ioapic,
    keyboard_controller,
    pit,
    power_management,
    reset_ports,
    rtc,
    serial,
    system_management,
    test_memory,
)
from vtl0_guest.cpu.devices.bus import Guard, MmioDevice, Platform, PortDevice, TimedDevice
from vtl0_guest.cpu.devices.clock import Clock, HostClock
from vtl0_guest.cpu.devices.isa_lines import IsaLines
from vtl0_guest.cpu.devices.local_apic import LocalApic
from vtl0_guest.cpu.devices.pic import PicPair

__all__ = ["Platform", "build_platform"]

_PIT_IRQ = 0


def build_platform(vp_count: int, ram_size: int, clock: Clock | None = None) -> Platform:
    """All devices in their state after RESET. `clock` is the host's unless given. The 8259 pair reaches vCPU 0."""
    clock = clock or HostClock()
    guard = Guard()
    local_apics: list[LocalApic] = []
    local_apics.extend(LocalApic(index, guard, clock, local_apics) for index in range(vp_count))
    pic = PicPair(local_apics[0].set_lint0)
    io_apic = ioapic.IoApic(guard, local_apics)
    for apic in local_apics:
        apic.on_end_of_interrupt = io_apic.end_of_interrupt
    lines = IsaLines(pic, io_apic)
    timer = pit.Pit(clock, lines.line(_PIT_IRQ), guard)
    clock_line = lines.line(rtc.IRQ)

    def clock_interrupts(level: bool) -> None:
        clock_line(level)
        if level:
            power.clock_event()

    cmos = rtc.Rtc(clock, clock_interrupts, guard, ram_size, vp_count)
    keyboard = keyboard_controller.KeyboardController(lines.line(keyboard_controller.IRQ), guard)
    power = power_management.PowerManagement(clock, lines.line(power_management.SCI_IRQ), guard)
    uarts = [serial.Uart(base, lines.line(irq), clock) for base, irq in serial.PORTS]
    debug_port = debug_exit.DebugExitPort(guard)
    delay = reset_ports.DelayPort()
    smram = system_management.SmramControl()
    smi = system_management.SystemManagementPorts(guard)
    smi_enable = system_management.SMI_ENABLE
    config = (
        system_management.CONFIG_ADDRESS,
        *range(system_management.CONFIG_DATA, system_management.CONFIG_DATA + 4),
    )
    ports: dict[int, PortDevice] = {
        **dict.fromkeys(PicPair.PORTS, pic),
        **dict.fromkeys((*pit.PORTS, pit.SYSTEM_CONTROL_B), timer),
        **dict.fromkeys((rtc.INDEX, rtc.DATA), cmos),
        **dict.fromkeys((keyboard_controller.DATA, keyboard_controller.COMMAND), keyboard),
        **dict.fromkeys(range(debug_exit.FIRST_PORT, debug_exit.FIRST_PORT + debug_exit.PORT_COUNT), debug_port),
        **dict.fromkeys(reset_ports.DELAY_PORTS, delay),
        **dict.fromkeys(power_management.PORTS, power),
        **dict.fromkeys(config, smram),
        **dict.fromkeys((system_management.APM_CONTROL, system_management.APM_STATUS), smi),
        **dict.fromkeys(range(smi_enable, smi_enable + 4), smi),
        reset_ports.SYSTEM_CONTROL_A: reset_ports.SystemControlA(guard),
        reset_ports.RESET_CONTROL: reset_ports.ResetControl(guard),
    }
    for uart, (base, _) in zip(uarts, serial.PORTS, strict=True):
        ports |= dict.fromkeys(range(base, base + 8), uart)
    timed: list[TimedDevice] = [timer, cmos, power, *(apic.timer for apic in local_apics)]
    mmio: dict[int, MmioDevice] = {ioapic.BASE: io_apic, **test_memory.pages(guard)}
    ports_of_uarts = serial.SerialPorts(uarts, guard)
    return Platform(guard, clock, ports, mmio, ports_of_uarts, pic, lines, local_apics, timed, smram, power)
