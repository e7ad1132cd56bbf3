"""A laboratory: connection to its VMM and its monitor."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from vtlab.channels import dial
from vtlab.client.calls import call, repeated
from vtlab.client.images import Image, ImageSource, read_image
from vtlab.client.machine import Machine
from vtlab.client.policy import Policy
from vtlab.client.runtime import MONITOR, Addresses, find
from vtlab.errors import BadArgument, BadImage, NotFound, PeerUnavailable
from vtlab.trust.roles import Role
from vtlab.v1 import vcpu_pb2, vmm_pb2, vmm_pb2_grpc

UPLOAD_DEADLINE = 300.0  # seconds
DEFAULT_DESIGN = "vtl"


def connect(
    vmm: str | None = None,
    monitor: str | None = None,
    trust: Path | str | None = None,
    role: Role | str = Role.OPERATOR,
    timeout: float = 10.0,
) -> Lab:
    """Connects to a laboratory.

    Args:
        vmm, monitor, trust: each as given, else from VTLAB_VMM, VTLAB_MONITOR and VTLAB_TRUST, else as `vtlab up` says.
        role: operator, or observer to look only.
        timeout: seconds to wait for the VMM to answer.

    Raises:
        PeerUnavailable: there is no laboratory, or it does not answer.
    """
    return Lab(find(vmm, monitor, trust), role, timeout)


class Lab:
    """A connection. Close it, or use it as a context manager; machines live on unless their own block ends.

    Attributes:
        addresses: where it is.
    """

    def __init__(self, addresses: Addresses, role: Role | str = Role.OPERATOR, timeout: float = 10.0) -> None:
        self.addresses = addresses
        self._role = Role(role)
        self._timeout = timeout
        self._peer = f"vmm at {addresses.vmm}"
        self._channel = dial(addresses.vmm, addresses.trust, role, Role.VMM, timeout)
        self._stub = vmm_pb2_grpc.VmmServiceStub(self._channel)
        self._kept: set[bytes] = set()  # SHA-256 of what the VMM was seen to have
        self._monitor_channel: grpc.Channel | None = None
        self._policy: Policy | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()
        if self._monitor_channel is not None:
            self._monitor_channel.close()

    @property
    def policy(self) -> Policy:
        """The policies of its machines. Raises PeerUnavailable if the monitor does not answer."""
        address = self.addresses.monitor
        if not address:
            raise PeerUnavailable("monitor", f"its address is not known: set {MONITOR}")
        if self._policy is None:  # made once: gRPC crashes if a stub is made for a channel that is closed
            channel = dial(address, self.addresses.trust, self._role, Role.MONITOR, self._timeout)
            self._monitor_channel, self._policy = channel, Policy(channel, f"monitor at {address}")
        return self._policy

    def upload(self, image: Image) -> bytes:
        """Stores an image in the VMM; returns its SHA-256. Raises BadImage if it arrived changed."""
        answer = call(self._peer, self._stub.UploadImage, image.chunks(), UPLOAD_DEADLINE)
        if answer.sha256 != image.sha256():
            raise BadImage(image.name, "arrived changed at the VMM")
        self._kept.add(answer.sha256)
        return answer.sha256

    def create(
        self,
        image: ImageSource,
        *,
        name: str = "",
        ram: int = 64 << 20,
        disk: int = 0,
        vp_count: int = 1,
        command_line: str = "",
        modules: Sequence[ImageSource | tuple[ImageSource, str]] = (),
        vtl1: bool | None = None,
        stop_on_reset: bool = False,
        image_format: vcpu_pb2.ImageFormat.ValueType = vcpu_pb2.IMAGE_FORMAT_DETECT,
        load_address: int = 0,
        entry: int = 0,
        start_mode: vcpu_pb2.StartMode.ValueType = vcpu_pb2.START_MODE_UNSPECIFIED,
        devices: Sequence[str] = (),
        personality: vcpu_pb2.Personality.ValueType = vcpu_pb2.PERSONALITY_UNSPECIFIED,
        vsm_profile: str = "",
        keep_memory_on_reset: bool = False,
        design: str = DEFAULT_DESIGN,
        design_options: Mapping[str, str] | None = None,
        filters: vmm_pb2.UserspaceFilters | None = None,
        deterministic: int | None = None,
    ) -> Machine:
        """Makes a machine; it does not run yet.

        Args:
            image: file or bytes to boot.
            name: of the machine; made up if empty.
            ram: bytes, a multiple of 2 MiB.
            disk: bytes of a disk that outlives RESET and power-off, a multiple of 4096; 0 for none.
            vp_count: vCPUs.
            command_line: for the kernel.
            modules: files or bytes for the boot loader's module list, each alone or with its command line.
            vtl1: offer VTL1 to the guest; by default where the design has it.
            stop_on_reset: a triple fault or a reset request ends the machine.
            devices: optional ones (MachineSpec.devices).
            personality: who answers at VTL1: a policy, or code that the guest supplies.
            keep_memory_on_reset: a RESET by the guest leaves RAM as it is, unless VTL1 wants it zeroed.
            vsm_profile: how VSM answers where its sources disagree (vtlab.hyperv.profiles).
            design: which way of protecting itself the machine offers (docs/designs.md).
            design_options: its switches.
            filters: for design `cr-filter`, what the machine's owner wants.
            deterministic: a seed, 0 to 2**64 - 1: runs repeat, in virtual time (docs/limits.md).
            image_format, load_address, entry, start_mode: see vtlab.v1.BootImage.

        Raises:
            BadImage: unreadable, larger than RAM, or malformed.
            BadArgument, AlreadyExists, LimitExceeded.
        """
        if deterministic is not None and deterministic not in range(1 << 64):
            raise BadArgument("deterministic", f"{deterministic} is no seed: 0 to 2**64 - 1")
        boot = read_image(image, ram)
        pairs = [module if isinstance(module, tuple) else (module, "") for module in modules]
        files = [(read_image(source, ram), text) for source, text in pairs]
        spec = vmm_pb2.MachineSpec(
            ram_size=ram,
            disk_size=disk,
            vp_count=vp_count,
            vtl1=design == DEFAULT_DESIGN if vtl1 is None else vtl1,
            stop_on_reset=stop_on_reset,
            devices=devices,
            personality=personality,
            vsm_profile=vsm_profile,
            keep_memory_on_reset=keep_memory_on_reset,
            design=design,
            design_options=design_options,
            filters=filters,
            deterministic=deterministic is not None,
            seed=deterministic or 0,
            image=vcpu_pb2.BootImage(
                sha256=boot.sha256(),
                format=image_format,
                command_line=command_line,
                load_address=load_address,
                entry=entry,
                start_mode=start_mode,
                modules=[vcpu_pb2.BootModule(sha256=file.sha256(), command_line=text) for file, text in files],
            ),
        )
        name = name or f"vm-{secrets.token_hex(4)}"
        try:
            self._create(vmm_pb2.CreateMachineRequest(vm=name, spec=spec), [boot, *(file for file, _ in files)])
        except BadImage as error:
            raise BadImage(boot.name, error.detail) from None
        return Machine(self._stub, self._peer, name, boot.name)

    def _create(self, request: vmm_pb2.CreateMachineRequest, images: Sequence[Image]) -> None:
        """With what it boots from, which is sent once; again to a VMM that has lost it."""
        for image in images:
            if image.sha256() not in self._kept:
                self.upload(image)
        try:
            call(self._peer, self._stub.CreateMachine, request)
        except NotFound:
            for image in images:
                self.upload(image)
            call(self._peer, self._stub.CreateMachine, request)

    def machine(self, name: str) -> Machine:
        """A machine that exists. Raises NotFound."""
        repeated(self._peer, self._stub.GetMachine, vmm_pb2.GetMachineRequest(vm=name))
        return Machine(self._stub, self._peer, name)

    def destroy_machines(self, deadline: float = 5.0) -> None:
        """Destroys all machines as far as the VMM can be reached, for the end of a laboratory. Raises nothing.

        Args:
            deadline: seconds for each.
        """
        with contextlib.suppress(grpc.RpcError):
            for machine in self._stub.ListMachines(vmm_pb2.ListMachinesRequest(), timeout=deadline).machines:
                with contextlib.suppress(grpc.RpcError):
                    self._stub.DestroyMachine(vmm_pb2.DestroyMachineRequest(vm=machine.vm), timeout=deadline)

    def machines(self) -> list[vmm_pb2.Machine]:
        """All machines of the VMM."""
        return list(repeated(self._peer, self._stub.ListMachines, vmm_pb2.ListMachinesRequest()).machines)
