"""Machines that boot Debian's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.integration.linux.images import Images, find, folder
from vtlab.client import Lab, Machine

RAM = 256 << 20
# Seconds for what takes some seven alone: the tests run beside others.
PATIENCE = 150


@pytest.fixture(scope="session")
def images() -> Images:
    found = find()
    if found is None:
        pytest.skip(f"no kernel in {folder()}: run 'make linux', or say by VTLAB_LINUX where one is")
    return found


@pytest.fixture
def boot(lab: Lab, images: Images) -> Iterator[Callable[..., Machine]]:
    """Starts a machine with variables for the script that its kernel starts (init.sh)."""
    with ExitStack() as stack:

        def start(vp_count: int = 1, **variables: object) -> Machine:
            words = [f"{name}={value}" for name, value in variables.items()]
            machine = stack.enter_context(
                lab.create(
                    images.kernel,
                    ram=RAM,
                    vp_count=vp_count,
                    command_line=" ".join(["console=ttyS0", *words]),
                    modules=[images.initrd],
                    stop_on_reset=True,
                )
            )
            machine.start()
            return machine

        yield start
