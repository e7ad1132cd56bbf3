"""Guest memory while it is being loaded: what is taken, what is free, what is out of range."""

from __future__ import annotations

from collections.abc import Callable

from vtlab.errors import BadImage

PAGE_SIZE = 4096
# Where RAM is RAM on a PC: below, the legacy hole from 640 KiB to 1 MiB, and the APICs' page range below 4 GiB.
LOW_END = 0x9FC00
FIRMWARE_START, FIRMWARE_SIZE = 0xF0000, 0x10000
HIGH_START = 0x10_0000
DEVICES_START = 0xFEC0_0000
ABOVE_4G = 1 << 32

_ZEROS = bytes(1 << 16)

# (guest-physical address, bytes)
Write = Callable[[int, bytes], None]


class Target:
    """Where an image is loaded to.

    Attributes:
        ram_size: bytes of guest RAM.
        vp_count: vCPUs of the machine, for formats that tell the guest.
        taken: ranges (first address, end) that hold something, in the order of loading.
        write: stores bytes; put() does after its checks.
    """

    def __init__(self, subject: str, ram_size: int, write: Write, vp_count: int = 1) -> None:
        """`subject` is the file that errors name."""
        self.subject = subject
        self.ram_size = ram_size
        self.vp_count = vp_count
        self.taken: list[tuple[int, int]] = []
        self.write = write

    def bad(self, detail: str) -> BadImage:
        """An error about this file."""
        return BadImage(self.subject, detail)

    def put(self, address: int, data: bytes, field: str, size: int | None = None) -> None:
        """Writes `data`, then zeros up to `size` bytes; takes the range.

        Raises:
            BadImage: the range is not inside RAM; `field` says what it belongs to.
        """
        size = len(data) if size is None else size
        end = self.take(address, size, field)
        if size == 0:
            return
        if data:
            self.write(address, data)
        for start in range(address + len(data), end, len(_ZEROS)):
            self.write(start, _ZEROS[: end - start])

    def take(self, address: int, size: int, field: str) -> int:
        """Takes a range without writing to it; returns its end. Raises BadImage as put() does."""
        end = address + size
        if address < 0 or end > self.ram_size:
            raise self.bad(f"{field}: needs {address:#x}-{end:#x}, RAM ends at {self.ram_size:#x}")
        if size:
            self.taken.append((address, end))
        return end

    def put_free(self, address: int, data: bytes, field: str) -> None:
        """As put(), for a range that nothing may have taken. Raises BadImage."""
        for first, end in self.taken:
            if first < address + len(data) and address < end:
                raise self.bad(f"{field}: {address:#x} is taken by the image")
        self.put(address, data, field)

    def is_free(self, address: int, size: int) -> bool:
        """RAM that nothing has taken."""
        clash = any(first < address + size and address < end for first, end in self.taken)
        return address + size <= self.ram_size and not clash

    def highest_end(self) -> int:
        """End of what lies highest, 0 if nothing was loaded."""
        return max((end for _, end in self.taken), default=0)

    def find_below(self, limit: int, size: int, field: str) -> int:
        """The highest page-aligned free range of `size` bytes that ends at or below `limit`.

        Raises:
            BadImage: there is none.
        """
        address = (min(limit, self.ram_size) - size) & ~(PAGE_SIZE - 1)
        while address >= 0:
            clash = [first for first, end in self.taken if first < address + size and address < end]
            if not clash:
                return address
            address = (min(clash) - size) & ~(PAGE_SIZE - 1)
        raise self.bad(f"{field}: no room for {size:#x} bytes below {limit:#x}")

    def find_above(self, start: int, size: int, field: str) -> int:
        """The lowest page-aligned free range of `size` bytes from `start` on. Raises BadImage if there is none."""
        address = (start + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        while address + size <= min(self.ram_size, DEVICES_START):
            clash = [end for first, end in self.taken if first < address + size and address < end]
            if not clash:
                return address
            address = (max(clash) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        raise self.bad(f"{field}: no room for {size:#x} bytes above {start:#x} in RAM of {self.ram_size:#x}")


def memory_map(ram_size: int) -> list[tuple[int, int, int]]:
    """(first address, bytes, type) as firmware reports it: type 1 is RAM, 2 reserved."""
    entries = [
        (0, min(LOW_END, ram_size), 1),
        (LOW_END, 0xA0000 - LOW_END, 2),
        (FIRMWARE_START, FIRMWARE_SIZE, 2),
        (HIGH_START, min(ram_size, DEVICES_START) - HIGH_START, 1),
        (DEVICES_START, ABOVE_4G - DEVICES_START, 2),
        (ABOVE_4G, ram_size - ABOVE_4G, 1),
    ]
    return [entry for entry in entries if entry[1] > 0]
