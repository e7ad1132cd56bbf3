"""Quotes of a real monitor about a real guest, checked offline: what is right passes, each forgery is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vmm.cli.main import main
from vmm.launcher import launch
from vtl0_guest.kernels import selfguard_image
from vtlab.errors import BadArgument
from vtlab.trust.__main__ import main as trust_main
from vtlab.trust.certificates import ensure_trust
from vtlab.v1.monitor_pb2 import Quote, SignedQuote

NONCE, OTHER_NONCE = b"0123456789abcdef", b"fedcba9876543210"
Verify = Callable[..., tuple[int, str, str]]


class Evidence:
    """Files of one run: a quote, what it is about, and a later quote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quote, self.later = folder / "quote", folder / "later"
        self.policy, self.authority = folder / "policy.yaml", folder / "ca.pem"
        self.first_counter = self.later_counter = 0


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    found = Evidence(tmp_path_factory.mktemp("quotes"))
    with launch() as lab, lab.create(selfguard_image(), command_line="heki=1") as machine:
        machine.start()
        wait_until(lambda: lab.policy.get(machine).locked, 60, "the policy is locked")
        found.quote.write_bytes(lab.policy.quote(machine, NONCE).SerializeToString())
        found.policy.write_text(lab.policy.get(machine).text)
        machine.reset()
        wait_until(lambda: lab.policy.get(machine).locked, 60, "the policy is locked again")
        found.later.write_bytes(lab.policy.quote(machine, OTHER_NONCE).SerializeToString())
        with pytest.raises(BadArgument, match="nonce"):
            lab.policy.quote(machine, b"short")
        found.authority.write_bytes((lab.addresses.trust / "ca.pem").read_bytes())
    found.first_counter = content(found.quote).counter
    found.later_counter = content(found.later).counter
    return found


def content(path: Path) -> Quote:
    return Quote.FromString(SignedQuote.FromString(path.read_bytes()).quote)


@pytest.fixture
def verify(evidence: Evidence, capsys: pytest.CaptureFixture[str]) -> Verify:
    def run(file: Path | None = None, authority: Path | None = None, **options: object) -> tuple[int, str, str]:
        arguments = ["verify", str(file or evidence.quote), "--authority", str(authority or evidence.authority)]
        for name, value in options.items():
            arguments += [f"--{name}", str(value)]
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        assert err.count("\n") == (1 if code else 0)
        return code, out, err

    return run


def test_all_that_it_says_is_right(evidence: Evidence, verify: Verify) -> None:
    code, out, _ = verify(
        policy=evidence.policy, nonce=NONCE.hex(), image=selfguard_image(), counter=evidence.first_counter
    )
    assert code == 0
    assert "checked: signature, nonce, policy, counter, image" in out
    assert content(evidence.quote).measurements
    assert evidence.later_counter > evidence.first_counter
    assert content(evidence.later).generation > content(evidence.quote).generation


def test_a_replayed_nonce(verify: Verify) -> None:
    code, _, err = verify(nonce=OTHER_NONCE.hex())
    assert (code, err) == (
        8,
        f"vtlab: nonce: the quote answers {NONCE.hex()}, not {OTHER_NONCE.hex()}: it is another's, or replayed\n",
    )


def test_a_changed_policy(evidence: Evidence, verify: Verify, tmp_path: Path) -> None:
    changed = tmp_path / "policy.yaml"
    changed.write_text(evidence.policy.read_text() + "\n")
    code, _, err = verify(policy=changed)
    assert code == 8
    assert err.startswith("vtlab: policy: VTL1 holds ")


def test_a_store_that_was_put_back(evidence: Evidence, verify: Verify) -> None:
    code, _, err = verify(counter=evidence.later_counter)
    assert code == 8
    assert err.startswith(f"vtlab: counter: {evidence.first_counter} is below {evidence.later_counter}")


def test_another_image(verify: Verify, tmp_path: Path) -> None:
    """One byte of text differs from what VTL1 measured."""
    from elftools.elf.elffile import ELFFile

    with selfguard_image().open("rb") as file:
        section = ELFFile(file).get_section_by_name(".text")
    assert section is not None
    offset = section.header.sh_offset
    data = bytearray(selfguard_image().read_bytes())
    data[offset] ^= 1
    changed = tmp_path / "kernel"
    changed.write_bytes(data)
    code, _, err = verify(image=changed)
    assert code == 8
    assert err.startswith("vtlab: measurement ")


def test_another_laboratory(verify: Verify, tmp_path: Path) -> None:
    other = ensure_trust(tmp_path / "other")
    code, _, err = verify(authority=other / "monitor" / "ca.pem")
    assert (code, err) == (8, "vtlab: certificate: was not issued by this authority\n")


def forged(evidence: Evidence, tmp_path: Path, **fields: bytes) -> Path:
    signed = SignedQuote.FromString(evidence.quote.read_bytes())
    for name, value in fields.items():
        setattr(signed, name, value)
    path = tmp_path / "forged"
    path.write_bytes(signed.SerializeToString())
    return path


def test_a_wrong_key(evidence: Evidence, verify: Verify, tmp_path: Path) -> None:
    """Another key for quotes of the same laboratory; and a role's certificate, which is none for quotes."""
    other = ensure_trust(tmp_path / "other")
    authority = tmp_path / "both.pem"
    authority.write_bytes(evidence.authority.read_bytes() + (other / "ca" / "ca.pem").read_bytes())
    file = forged(evidence, tmp_path, certificate=(other / "monitor" / "quote.pem").read_bytes())
    assert verify(file, authority)[2] == "vtlab: signature: is not of this quote by this key\n"
    file = forged(evidence, tmp_path, certificate=(other / "guest" / "guest.pem").read_bytes())
    assert verify(file, authority)[2] == "vtlab: certificate: is not of a monitor's key for quotes\n"
    file = forged(evidence, tmp_path, certificate=b"junk")
    assert verify(file, authority)[2] == "vtlab: certificate: is none for quotes\n"


def test_a_changed_quote(evidence: Evidence, verify: Verify, tmp_path: Path) -> None:
    changed = content(evidence.quote)
    changed.locked = not changed.locked
    file = forged(evidence, tmp_path, quote=changed.SerializeToString())
    assert verify(file)[::2] == (8, "vtlab: signature: is not of this quote by this key\n")


@pytest.mark.parametrize("data", [b"\xff\xff", b"junk that is no message"])
def test_what_is_no_quote(verify: Verify, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "junk"
    file.write_bytes(data)
    code, _, err = verify(file)
    assert code == 4
    assert err.startswith("vtlab: quote: is no such message")


@pytest.mark.parametrize("nonce", ["xyz", "00", "00" * 65])
def test_nonces_that_are_none(verify: Verify, nonce: str) -> None:
    code, _, err = verify(nonce=nonce)
    assert code == 4
    assert err.startswith("vtlab: --nonce: ")


def test_keys_are_renewed_with_the_others(tmp_path: Path) -> None:
    ensure_trust(tmp_path)
    before = (tmp_path / "monitor" / "quote.pem").read_bytes()
    trust_main([str(tmp_path), "--renew"])
    assert (tmp_path / "monitor" / "quote.pem").read_bytes() != before
