"""The laboratory and the machine that a command means. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.cli.output import progress
from vtlab.errors import BadArgument, NotFound, one_line

if TYPE_CHECKING:
    from vtlab.client import Lab, Machine


@contextlib.contextmanager
def running(vmm: str, monitor: str, trust: str) -> Iterator[Lab]:
    """The laboratory that is running: as given, by the environment, or by `vtlab up`."""
    from vtlab.client import connect

    with connect(vmm, monitor, trust) as lab:
        yield lab


@contextlib.contextmanager
def given_or_private(vmm: str, monitor: str, trust: str, rules: str = "", as_json: bool = False) -> Iterator[Lab]:
    """The laboratory given by option or environment; if none is, three processes of our own until the block ends."""
    if vmm or os.environ.get("VTLAB_VMM"):
        if rules:
            raise BadArgument("--rules", "code reaches a monitor only when it is started, and this one runs already")
        with running(vmm, monitor, trust) as lab:
            yield lab
        return
    from vmm.launcher import launch

    with contextlib.ExitStack() as stack:
        with progress("starting guest, monitor and VMM", as_json):
            lab = stack.enter_context(launch(load_rules(rules)))
        yield lab


def load_rules(file: str) -> Any:
    """What a Python file calls `rules`; None without a file. Raises BadArgument."""
    if not file:
        return None
    if not Path(file).is_file():
        raise BadArgument(file, "no such file")
    import runpy

    try:
        names = runpy.run_path(file, run_name="vtlab_rules")
    except Exception as error:
        raise BadArgument(file, one_line(f"{type(error).__name__}: {error}")) from error
    if "rules" not in names:
        raise BadArgument(file, "does not define `rules`")
    return names["rules"]


@contextlib.contextmanager
def chosen(lab: Lab, name: str) -> Iterator[Machine]:
    """The machine of that name, or the only one. Raises NotFound, BadArgument."""
    if not name:
        names = [machine.vm for machine in lab.machines()]
        if not names:
            raise NotFound("machine", "the laboratory has none")
        if len(names) > 1:
            raise BadArgument("--vm", f"there are several machines: {', '.join(sorted(names))}")
        name = names[0]
    machine = lab.machine(name)
    try:
        yield machine
    finally:
        machine.close()
