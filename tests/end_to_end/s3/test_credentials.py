"""Tests that credentials, endpoint and region are found where AWS tools look for them, and are shown nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import TwoTowerError
from pipeline.output.layout import check_writable
from pipeline.storage import retrying
from pipeline.storage.storage import Storage
from tests.end_to_end.s3.server import KEY, SECRET
from tests.pipeline.cases import make_job, plan_of, prompts, write
from tests.ports import held_ports

pytestmark = [pytest.mark.server]

ROOT = Path(__file__).parents[3]
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")


def use_profile(folder: Path, endpoint: str, secret: str = SECRET) -> dict[str, str]:
    """Write the files of a profile "towers", and return an environment in which only they give access to AWS."""
    credentials, config = folder / "credentials", folder / "config"
    credentials.write_text(f"[towers]\naws_access_key_id = {KEY}\naws_secret_access_key = {secret}\n")
    config.write_text(f"[profile towers]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    names = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials), "AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "towers"}
    return {name: value for name, value in os.environ.items() if name not in AWS} | names


def test_a_whole_job_with_a_profile_shows_no_secret(s3: str, s3_endpoint: str, tmp_path: Path) -> None:
    """Neither the output of the command nor its output folder shows the key or the secret of the profile."""
    file = write(tmp_path / "a.parquet", prompt=[*prompts(20), None])
    inputs, output = Storage(f"{s3}/in"), Storage(f"{s3}/out")
    inputs.write("a.parquet", file.read_bytes())
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: secret\ninput: {{path: '{s3}/in'}}\noutput: {{path: '{s3}/out', rows_per_file: 10}}\n"
        "model: {checkpoint: 'builtin:noise', dtype: float32}\ngeneration: {max_new_tokens: 4}\nworkers: {gpus: 0}\n"
    )
    environment = use_profile(tmp_path, s3_endpoint)
    command = [sys.executable, "-m", "pipeline", "run", str(job), "--local", "--debug"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [done.stdout.encode(), done.stderr.encode(), *(output.read(info.name) for info in output.find())]
    assert len(shown) > 8
    for text in shown:
        assert SECRET.encode() not in text
        assert KEY.encode() not in text


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-marker"),
        ("AWS_ACCESS_KEY_ID", "unknown-marker"),
        ("AWS_ENDPOINT_URL", "http://user:password-marker@127.0.0.1:{silent_port}"),
        ("AWS_SESSION_TOKEN", "token-marker"),
    ],
    ids=["secret", "key", "endpoint", "token"],
)
def test_no_error_shows_a_secret(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str, value: str
) -> None:
    """Whichever setting is wrong, the error is one line that shows neither its value nor the secret."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(retrying, "PATIENCE_S", 0.2)
    monkeypatch.setattr(retrying, "NOTICE_S", 0.0)
    texts = []
    with held_ports(1) as [silent_port]:
        monkeypatch.setenv(setting, value.format(silent_port=silent_port))
        S3FileSystem.clear_instance_cache()
        job = make_job(f"{s3}/in/*.parquet", f"{s3}/out")
        store = Storage(f"{s3}/in")
        local = make_job(write(tmp_path / "a.parquet", prompt=prompts(3)), f"{s3}/out")
        for call in (
            lambda: plan_of(job),
            lambda: store.read("x"),
            lambda: store.write("x", b"data"),
            lambda: store.create("x", b"data"),
            lambda: store.remove("x"),
            lambda: check_writable(local.output.path),
        ):
            with pytest.raises(TwoTowerError) as caught:
                call()
            texts.append(str(caught.value))
    for text in [*texts, *caplog.messages]:
        assert "\n" not in text
        assert "marker" not in text
        assert SECRET not in text


def test_what_is_missing_is_said(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    for name in AWS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    S3FileSystem.clear_instance_cache()
    with pytest.raises(
        TwoTowerError, match="no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
    ):
        Storage(s3).read("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(TwoTowerError, match=r"The config profile .nobody. could not be found") as caught:
        Storage(s3).read("x")
    assert "\n" not in str(caught.value)
