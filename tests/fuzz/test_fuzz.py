"""A short run of every target with two seeds, and the corpus as it is; `make fuzz` runs more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.target import CORPUS, Target, mutated
from tests.fuzz.targets import TARGETS
from tests.unit.loaders.images import RAM_SIZE, Memory
from vtl0_guest.kernels import selfguard_image
from vtl0_guest.loaders import load
from vtl1_monitor.policy.image import BootImage
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.resolve import resolve
from vtl1_monitor.policy.text import parse
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2

SHORT = {
    "certificates": 500,
    "enters": 1_000,
    "exits": 2_000,
    "hypercalls": 2_000,
    "journal": 200,
    "loaders": 200,
    "messages": 2_000,
    "modules": 200,
    "policies": 200,
    "sealed": 500,
}


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_run(name: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--count", str(SHORT[name]), "--seed", str(seed)]) == 0
    assert f"{name}: {SHORT[name]} inputs of seed {seed}" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CORPUS / "images").iterdir()), ids=lambda path: path.name)
def test_a_hostile_image_is_refused(path: Path) -> None:
    """It is in none of its format: as flat bytes anything may be loaded."""
    boot = vcpu_pb2.BootImage(path=path.name)
    with pytest.raises(BadImage):
        load(path.read_bytes(), boot, [], Memory().write, RAM_SIZE, 1)


@pytest.mark.parametrize("path", sorted((CORPUS / "policies").iterdir()), ids=lambda path: path.name)
def test_a_hostile_policy_is_refused(path: Path) -> None:
    image = BootImage(selfguard_image().read_bytes(), "kernel")
    with pytest.raises(PolicyProblems) as refused:
        resolve(parse(path.read_bytes(), path.name), image, 64 << 20, None)
    assert all(problem.message for problem in refused.value.problems)


class _Broken(Target):
    def step(self, rng: random.Random) -> str:
        if rng.random() < 0.1:
            raise KeyError("a hole")
        return "survived"


def test_a_defect_is_reported_with_what_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "policies", _Broken)
    assert main(["policies", "--seed", "7"]) == 1
    told = capsys.readouterr()
    assert "policies: FAILED at input" in told.out
    assert "seed 7" in told.out
    assert "a hole" in told.err


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second = (
        [mutated(rng, [b"abcdefgh" * 9, b"xyz"]) for _ in range(200)] for rng in (random.Random(3), random.Random(3))
    )
    assert first == second
    assert len(set(first)) > 100
