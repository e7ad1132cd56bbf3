"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtlab_attacks.table import ATTACKS, CONTROLS

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
ATTACK_GUIDE = (ROOT / "docs/attacks.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; "" for those that name none."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for named, content in every if named == language]


def run(script: str) -> str:
    """Output of a script in a process of its own, started at the root of the tree."""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_attack_script_says_what_the_readme_says() -> None:
    (script,) = blocks(README, "python")
    assert run(script) == blocks(README, "")[-1]


def test_the_last_line_of_the_demo_counts_what_there_is() -> None:
    demo = blocks(README, "")[0]
    attacks, controls = len(ATTACKS), len(CONTROLS)
    unprotected = sum(not attack.impossible_unprotected for attack in ATTACKS)
    assert demo.splitlines()[-1] == (
        f"demo: attacks {attacks}, blocked {attacks}, succeeded 0; controls {controls}, kept {controls}; "
        f"unprotected succeeded {unprotected}"
    )


@pytest.mark.parametrize("number", range(len(blocks(ATTACK_GUIDE, "python"))))
def test_the_scripts_of_the_attack_guide_run(number: int) -> None:
    run(blocks(ATTACK_GUIDE, "python")[number])


def test_the_attack_of_the_guide_is_one() -> None:
    script = blocks(ATTACK_GUIDE, "python")[0] + "\n".join(
        [
            "from vmm.launcher import launch",
            "from vtlab_attacks.guest import boot",
            "with launch() as lab:",
            "    for protected in (False, True):",
            "        with boot(lab, protected) as guest:",
            "            print(ATTACK.run(guest.machine, guest.driver, guest.symbols).outcome.value)",
        ]
    )
    assert run(script).split() == ["succeeded", "blocked"]
