"""Tests that no command shows the credentials in a URL that it is given."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app

URL = "s3://KEYIDQz1:Qz1/Xy9@bucket/x"


@pytest.mark.parametrize(
    "command",
    [
        *(
            f"{name} {URL}"
            for name in ("status", "show", "report", "verify", "clean", "canary", "run", "plan", "preview")
        ),
        f"canary builtin:noise --out {URL}",
        f"run JOB --local --set output.path={URL}",
        f"plan JOB --set input.path={URL}",
        f"plan JOB --set model.checkpoint={URL}",
        f"calibrate JOB --to {URL}",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(tmp_path: Path, command: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {{path: {tmp_path}}}\noutput: {{path: {tmp_path}/out}}\nmodel: {{checkpoint: builtin:noise}}\n"
    )
    result = CliRunner().invoke(app, command.replace("JOB", str(job)).split(" "))
    assert result.exit_code == 1
    assert "credentials do not belong" in result.output or "a job file must be on this machine" in result.output
    for secret in ("KEYID", "Qz1", "Xy9"):
        assert secret not in result.output
