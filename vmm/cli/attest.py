"""`vtlab quote` and `vtlab verify`: what VTL1 says of a machine, signed, and whether that is what one wants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.output import as_dict, print_json
from vtlab.errors import BadArgument

_NONCE = typer.Option("--nonce", metavar="HEX", help="8 to 64 bytes that were never used before.")


def quote(
    nonce: Annotated[str, _NONCE],
    vm: Annotated[str, typer.Argument(metavar="[MACHINE]", help="Not needed if there is only one.")] = "",
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where to; standard output without.")] = "",
    as_json: options.Json = False,
    vmm: options.Vmm = "",
    monitor: options.Monitor = "",
    trust: options.Trust = "",
) -> None:
    """Have the monitor sign what it holds: policy, lock, measurements, counters."""
    wanted = _nonce(nonce)
    with laboratory.running(vmm, monitor, trust) as lab, laboratory.chosen(lab, vm) as machine:
        signed = lab.policy.quote(machine, wanted)
    if out:
        Path(out).write_bytes(signed.SerializeToString())
    if as_json:
        print_json(as_dict(signed))
    elif not out:
        sys.stdout.buffer.write(signed.SerializeToString())


def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="From `vtlab quote`.")],
    authority: Annotated[str, typer.Option("--authority", metavar="FILE", help="ca.pem of the laboratory.")],
    policy: Annotated[str, typer.Option("--policy", metavar="FILE", help="It holds this one, locked.")] = "",
    nonce: Annotated[str, _NONCE] = "",
    image: Annotated[str, typer.Option("--image", metavar="ELF", help="What it measured comes from this file.")] = "",
    counter: Annotated[int, typer.Option("--counter", min=-1, help="Its counter is not below.")] = -1,
    as_json: options.Json = False,
) -> None:
    """Check a quote, offline; what no option asks for is not checked. Exit code 8 if it is refused."""
    from vtlab.attestation import Wanted
    from vtlab.attestation import verify as check

    wanted = Wanted(
        nonce=_nonce(nonce) if nonce else None,
        policy=Path(policy).read_bytes() if policy else None,
        counter=counter if counter >= 0 else None,
        image=Path(image).read_bytes() if image else None,
    )
    found = check(Path(file).read_bytes(), Path(authority).read_bytes(), wanted)
    if as_json:
        print_json(as_dict(found))
        return
    checked = [name for name in ("nonce", "policy", "counter", "image") if getattr(wanted, name) is not None]
    sys.stdout.write(
        f"{file}: signed by this laboratory's monitor; machine {found.vm}, generation {found.generation}, counter "
        f"{found.counter}, policy {found.policy_sha256.hex() or 'none'}, {'locked' if found.locked else 'open'}, "
        f"{len(found.measurements)} measured; checked: {', '.join(['signature', *checked])}\n"
    )


def _nonce(text: str) -> bytes:
    from vtlab.attestation import NONCE_SIZES

    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        raise BadArgument("--nonce", "is not hexadecimal") from None
    if len(nonce) not in NONCE_SIZES:
        raise BadArgument("--nonce", f"has {len(nonce)} bytes, not {NONCE_SIZES[0]} to {NONCE_SIZES[-1]}")
    return nonce
