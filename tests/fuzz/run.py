"""Fuzzes everything that reads untrusted bytes: python -m tests.fuzz.run [--seconds 30] TARGET… | all

The fuzzing is guided by coverage. Each target runs in a process of its own, which libFuzzer ends. Inputs that break a
target are kept in tests/fuzz/out/TARGET.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent / "out"
SECONDS_AT_MOST, MIB_AT_MOST = 30, 4096
"""The limits for one input."""


def main() -> int:
    """Fuzz the chosen targets and return the number of those that broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="+")
    chosen = parser.parse_args()
    if chosen.in_this_process:
        _fuzz(chosen.targets[0], chosen.seconds)
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if chosen.targets == ["all"] else chosen.targets
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    broken = []
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz.run", "--in-this-process", "--seconds", str(chosen.seconds), name]
        if subprocess.run(command, check=False).returncode != 0:
            broken.append(name)
    print(f"broken: {', '.join(broken)}; see {OUT}" if broken else f"{len(names)} targets, nothing found")
    return len(broken)


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["pipeline", "yaml", "jinja2", "json"]):
        import jinja2.compiler  # the pipeline imports it only when needed
        import jinja2.sandbox  # noqa: F401

        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    found = OUT / name
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds()):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-timeout={SECONDS_AT_MOST}", f"-rss_limit_mb={MIB_AT_MOST}"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={found}{os.sep}", corpus], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
