"""Runs all tests several times in a row, beside processes that keep the cores busy; `make stress` calls it.

A test that depends on the speed of the machine fails here sooner or later. After the first run with
a failure it stops with exit code 1.
`python -m tests.stress --times 30 tests/end_to_end/test_run.py` does the same with some files.
"""

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack

BUSY = "while True: pass"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["tests"], help="files or folders to run; by default all")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--busy", type=int, default=2, help="number of processes that keep cores busy")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-n", "3", "--no-loadscope-reorder", *options.files]
    with ExitStack() as stack:
        for _ in range(options.busy):
            stack.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
        for number in range(1, options.times + 1):
            started = time.monotonic()
            failed = subprocess.run(command, check=False).returncode
            verdict = "failed" if failed else "passed"
            print(f"run {number} of {options.times} {verdict} in {time.monotonic() - started:.0f} s", flush=True)
            if failed:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
