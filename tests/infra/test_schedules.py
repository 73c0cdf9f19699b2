"""Tests infra/systemd and infra/cron, which run a job every night on a plain machine."""

import re
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.infra.files import INFRA, ROOT, variables_of
from tests.waiting import PATIENCE_S
from workers.replica.replica import FLUSH_S, LEAVE_S

SYSTEMD = INFRA / "systemd"
CRON = INFRA / "cron/twotower"
KEYS = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        *("Type", "User", "WorkingDirectory", "EnvironmentFile", "ExecStart", "Restart", "RestartSec", "KillMode"),
        *("TimeoutStopSec", "SuccessExitStatus", "NoNewPrivileges", "PrivateTmp", "ProtectSystem"),
    },
    "Timer": {"OnCalendar", "Persistent"},
    "Install": {"WantedBy"},
}
"""Keys that the units may use, from systemd.unit, systemd.service, systemd.exec, systemd.kill and systemd.timer."""


def unit(name: str) -> RawConfigParser:
    parser = RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    parser.read(SYSTEMD / name)
    return parser


@pytest.mark.parametrize("name", ["twotower-nightly.service", "twotower-nightly.timer"])
def test_the_units_hold_keys_that_systemd_has(name: str) -> None:
    parsed = unit(name)
    for section in parsed.sections():
        assert set(parsed[section]) <= KEYS[section]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """systemd accepts the units, with the folder of this project in them."""
    for file in SYSTEMD.iterdir():
        text = file.read_text().replace("/opt/twotower/.venv/bin/python", "/bin/true")
        (tmp_path / file.name).write_text(text.replace("/opt/twotower", str(ROOT)))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    calendar = ["systemd-analyze", "calendar", unit("twotower-nightly.timer")["Timer"]["OnCalendar"]]
    assert (
        "Next elapse:"
        in subprocess.run(calendar, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
    )


def test_a_stop_leaves_the_flush_to_the_driver() -> None:
    """systemd sends SIGTERM to the driver alone, and waits longer than its replicas need to save what they finished."""
    service = unit("twotower-nightly.service")["Service"]
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > FLUSH_S + LEAVE_S
    assert service["SuccessExitStatus"] == "143"
    assert service["ExecStart"] == f"{service['WorkingDirectory']}/.venv/bin/python -m pipeline run jobs/nightly.yaml"


def cron_lines() -> tuple[dict[str, str], str]:
    """Return the variables, and the one line with a schedule."""
    lines = [line for line in CRON.read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines[:-1])
    return settings, lines[-1]


def test_the_line_of_cron_is_one() -> None:
    """The line has a schedule, a user and a command with escaped percent signs; cron reads a file of this name, and
    every variable is defined."""
    settings, line = cron_lines()
    schedule = re.match(r"(\d+) (\d+) \* \* \* twotower cd ", line)
    assert schedule is not None
    assert int(schedule[1]) < 60
    assert int(schedule[2]) < 24
    assert re.findall(r"(?<!\\)%", line) == []
    assert re.fullmatch(r"[\w-]+", CRON.name)
    assert CRON.read_text().endswith("\n")
    assert variables_of(ROOT / "jobs/synth.yaml") <= settings.keys()


def day_before() -> str:
    """Return yesterday's date in UTC, as `date` prints it."""
    return subprocess.run(
        ["date", "-u", "-d", "yesterday", "+%F"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_cron_waits_for_the_night_before_and_takes_the_date_first(tmp_path: Path) -> None:
    """Two runs of the line at once follow one after the other, and each takes its date before it waits."""
    _, line = cron_lines()
    command = line.split(" twotower ", 1)[1].replace("\\%", "%").replace("/opt/twotower", str(tmp_path))
    command = command.replace("logger -t twotower", f"tee -a {tmp_path}/log")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/nightly.yaml").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "begin $DATE $*"\nsleep 0.3\necho end\n')
    python.chmod(0o755)
    days = [day_before()]
    both = [subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in both:
        run.communicate(timeout=PATIENCE_S)
        assert run.returncode == 0
    days.append(day_before())  # differs if midnight has passed meanwhile
    first, end, second, last = (tmp_path / "log").read_text().splitlines()
    assert (end, last) == ("end", "end")
    assert {first, second} <= {f"begin {day} -m pipeline run jobs/nightly.yaml" for day in days}
