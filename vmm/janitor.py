"""Removes the folder of a laboratory whose launcher dies without having its last word.

The three servers could not do it: each may remove what is its own alone (vtlab.confinement). A shell waits until the
launcher, however it ends, lets go of a pipe; it costs a megabyte, and starts in a millisecond.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

# The first second is for the servers, which drain meanwhile. The launcher that ends in order says so with a line.
_SCRIPT = """
trap '' HUP INT TERM
read -r _ && exit
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 1; rm -rf -- "$1"; test -e "$1" || exit; done
"""


@contextlib.contextmanager
def removed_at_the_end(folder: Path) -> Iterator[None]:
    """While the block runs, the end of this process is the end of the folder too. The block's end leaves it there."""
    command = ["/bin/sh", "-c", _SCRIPT, "vtlab-janitor", str(folder)]
    try:
        shell = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:  # a system without a shell: the next launcher sweeps
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            shell.communicate(b"done\n")
