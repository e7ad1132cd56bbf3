"""`python -m tests.fuzz TARGET --count N --seed S`: gives one target N inputs and says what came of them.

Ends with 1 at the first input that it should have survived; --seed and --count of the last line repeat it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.fuzz.targets import TARGETS

SLOW = 1.0  # seconds that one input may take on an idle machine
_REPORT_EVERY = 30.0  # seconds


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--list", action="store_true", help="names the targets")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.list or given.target is None:
        print("\n".join(sorted(TARGETS)))
        return 0
    return run(given.target, given.count, given.seed)


def run(name: str, count: int, seed: int) -> int:
    """0 if every input was survived within SLOW seconds of processor time."""
    rng = random.Random(seed)
    target = TARGETS[name]()
    outcomes: Counter[str] = Counter()
    slowest, begin, reported = 0.0, time.monotonic(), time.monotonic()
    before = peak = 0
    done = 0
    try:
        while done < count:
            start = time.thread_time()
            outcomes[target.step(rng)] += 1
            slowest = max(slowest, time.thread_time() - start)
            done += 1
            if done == min(1_000, count):
                before = resident()
            if done % 1_000 == 0:
                peak = max(peak, resident())
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                print(f"{name}: {done} inputs, {resident() >> 20} MiB", file=sys.stderr, flush=True)
        target.check()
    except Exception:  # noqa: BLE001 - that is what is looked for
        traceback.print_exc()
        print(f"{name}: FAILED at input {done + 1} of seed {seed}")
        return 1
    finally:
        target.close()
    took = time.monotonic() - begin
    for outcome, times in outcomes.most_common():
        print(f"  {times:>9} {outcome}")
    print(
        f"{name}: {count} inputs of seed {seed} in {took:.1f} s ({count / took:.0f}/s), 0 failures, slowest "
        f"{slowest * 1000:.1f} ms, memory {before / 2**20:.1f} MiB after 1,000 inputs, {resident() / 2**20:.1f} MiB at "
        f"the end, {peak / 2**20:.1f} MiB at most"
    )
    return 0 if slowest < SLOW else 1


if __name__ == "__main__":
    sys.exit(main())
