"""What a chipset has for system-management mode: the register that opens and locks SMRAM, and a port that asks for SMI.

Sources: Intel 3-series (Q35) data sheet, SMRAM (device 0, offset 0x9D); ICH9 data sheet, SMI_EN, APM_CNT, APM_STS. The
host bridge has no other register, not even an identity: no operating system takes it for a PCI bus.
"""

from __future__ import annotations

from vtl0_guest.cpu.devices.bus import Guard, SystemManagementInterrupt

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
APM_CONTROL, APM_STATUS = 0xB2, 0xB3
SMI_ENABLE = 0x630
SMRAM_OFFSET = 0x9D
# What to write to CONFIG_ADDRESS for the doubleword that holds SMRAM: bus 0, device 0, function 0.
SMRAM_ADDRESS = 0x8000_0000 | SMRAM_OFFSET & ~3

OPEN, LOCK, ENABLE = 1 << 6, 1 << 4, 1 << 3
BASE_SEGMENT = 0b010  # 0xA0000-0xBFFFF
_CONFIG_WRITABLE = 0x8000_0000 | 0x00FF_FFFC
_GLOBAL, _APM = 1 << 0, 1 << 5


class SmramControl:
    """The SMRAM register, behind the PCI configuration ports.

    Attributes:
        value: OPEN: SMRAM answers outside SMM too. ENABLE: there is SMRAM at all. LOCK: OPEN is zero and nothing of
            this changes until RESET.
        used: it was enabled once; until then nothing has to look at it.
    """

    def __init__(self) -> None:
        self._address = 0
        self.value = BASE_SEGMENT
        self.used = False

    def shows(self, in_smm: bool) -> bool:
        """SMRAM, rather than the memory under it, is at its addresses."""
        return bool(self.value & ENABLE) and (in_smm or bool(self.value & OPEN))

    def read(self, port: int, size: int) -> int:
        if port < CONFIG_DATA:
            value, first = self._address, CONFIG_ADDRESS
        elif self._address & ~3 == SMRAM_ADDRESS:
            value, first = self.value << 8 * (SMRAM_OFFSET & 3), CONFIG_DATA
        else:
            value, first = 0xFFFF_FFFF, CONFIG_DATA
        return value >> 8 * (port - first) & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        """CONFIG_ADDRESS takes doublewords only, as on PCs."""
        if port == CONFIG_ADDRESS:
            if size == 4:
                self._address = value & _CONFIG_WRITABLE
            return
        first = self._address & 3 | port - CONFIG_DATA
        if self._address & ~3 == SMRAM_ADDRESS and first <= SMRAM_OFFSET & 3 < first + size:
            self._write_smram(value >> 8 * ((SMRAM_OFFSET & 3) - first) & 0xFF)

    def _write_smram(self, value: int) -> None:
        if self.value & LOCK:
            return
        value &= OPEN | LOCK | ENABLE
        self.used = self.used or bool(value & ENABLE)
        self.value = BASE_SEGMENT | (value & ~OPEN if value & LOCK else value)


class SystemManagementPorts:
    """APM_CNT, whose writes ask for SMI where SMI_EN lets them, APM_STS, and SMI_EN."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._registers = {APM_CONTROL: 0, APM_STATUS: 0}
        self._enable = 0

    def read(self, port: int, size: int) -> int:
        if port >= SMI_ENABLE:
            return self._enable >> 8 * (port - SMI_ENABLE) & (1 << 8 * size) - 1
        return self._registers[port]

    def write(self, port: int, size: int, value: int) -> None:
        if port >= SMI_ENABLE:
            shift = 8 * (port - SMI_ENABLE)
            mask = (1 << 8 * size) - 1 << shift
            self._enable = self._enable & ~mask | value << shift & mask & (_GLOBAL | _APM)
            return
        self._registers[port] = value & 0xFF
        if port == APM_CONTROL and self._enable & _GLOBAL and self._enable & _APM:
            self._guard.post_exit(SystemManagementInterrupt())
