"""An image of a machine's memory as a kernel keeps it on a disk, and what VTL1 seals beside it. Pure.

vtlab.services.HIBERNATION_HEADER has the layout. VTL1's state holds what VTL0 cannot read and what decides: rules,
keys, rights of pages, the processor, and a digest of the pages that VTL0 has kept. It is encrypted with a key that
exists once (vtl1_monitor/tickets.py).
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vtl1_monitor.tickets import Ticket
from vtlab.ram import PAGE_SIZE
from vtlab.services import (
    HIBERNATION_HEADER,
    HIBERNATION_MAGIC,
    MAX_HIBERNATION_STATE,
    SEALED_STATE_HEADER,
    SEALED_STATE_MAGIC,
)

_NONCE = 12


class BadImage(Exception):
    """The image is not one, or not the one. The text says why."""


@dataclass(frozen=True)
class Kept:
    """What VTL1 keeps of a machine that is off.

    Attributes:
        image_sha256, ram_size, vp_count: of the machine; another one cannot go on with it.
        machine: VTL1's own, by snapshot.dump().
        processor: ProcessorState of vCPU 0, serialized.
        own: page number -> content, for pages that VTL0 could not keep, or did not.
        digest: of those that it kept.
    """

    image_sha256: bytes
    ram_size: int
    vp_count: int
    machine: bytes
    processor: bytes
    own: dict[int, bytes]
    digest: bytes


class Image(NamedTuple):
    """`pages[i]` is the content of guest page `numbers[i]`; `state` VTL1's, empty before it is there."""

    rip: int
    rsp: int
    numbers: tuple[int, ...]
    content: bytes
    state_page: int
    state: bytes

    def page(self, position: int) -> bytes:
        return self.content[position * PAGE_SIZE : (position + 1) * PAGE_SIZE]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the numbers and the pages."""
        return hashlib.sha256(struct.pack(f"<{len(self.numbers)}Q", *self.numbers) + self.content).digest()


def read_image(data: bytes, ram_pages: int) -> Image:
    """Takes whole pages of an image apart. Raises BadImage."""
    magic, count, state_size, rip, rsp = HIBERNATION_HEADER.unpack_from(data)
    if magic != HIBERNATION_MAGIC:
        raise BadImage("no image of memory")
    first = 1 + -(-count * 8 // PAGE_SIZE)
    state_page = first + count
    room = len(data) - state_page * PAGE_SIZE
    if not 0 < count <= ram_pages or room < 0 or state_size > min(room, MAX_HIBERNATION_STATE):
        raise BadImage(f"{count} pages and {state_size} bytes of state are not in {len(data)} bytes")
    numbers = struct.unpack_from(f"<{count}Q", data, PAGE_SIZE)
    if numbers[-1] >= ram_pages or any(low >= high for low, high in pairwise(numbers)):
        raise BadImage("page numbers do not ascend within RAM")
    start = state_page * PAGE_SIZE
    return Image(rip, rsp, numbers, data[first * PAGE_SIZE : start], state_page, data[start : start + state_size])


def seal(content: bytes, vm: str, ticket: Ticket) -> bytes:
    """VTL1's state as it goes to the disk."""
    assert ticket.key is not None, "a ticket just issued has a key"
    nonce = os.urandom(_NONCE)
    header = SEALED_STATE_HEADER.pack(SEALED_STATE_MAGIC, _name(vm), ticket.number, nonce)
    return header + AESGCM(ticket.key).encrypt(nonce, zlib.compress(content, 1), header)


def unseal(data: bytes, vm: str, number: int, key: bytes | None) -> bytes:
    """The inverse of seal().

    Args:
        number: of the last state that was sealed of this machine.
        key: of that one; None if it may not be restored.

    Raises:
        BadImage: it is another one, or was changed.
    """
    if len(data) < SEALED_STATE_HEADER.size:
        raise BadImage("VTL1's state is missing")
    magic, name, own, nonce = SEALED_STATE_HEADER.unpack_from(data)
    if magic != SEALED_STATE_MAGIC:
        raise BadImage("VTL1's state is none")
    if name != _name(vm):
        raise BadImage("another machine's VTL1 sealed it")
    if own != number:
        raise BadImage(f"it is number {own}, and number {number} was sealed last")
    if key is None:
        raise BadImage(f"number {own} was restored already, or the machine went on without it")
    try:
        content = AESGCM(key).decrypt(nonce, data[SEALED_STATE_HEADER.size :], data[: SEALED_STATE_HEADER.size])
    except InvalidTag:
        raise BadImage("VTL1's state was changed, or another VTL1 sealed it") from None
    return zlib.decompress(content)


def _name(vm: str) -> bytes:
    return hashlib.sha256(vm.encode()).digest()
