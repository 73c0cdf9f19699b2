"""Tests that no secret of a job file gets into messages or into the output: in URLs, and by way of variables."""

from datetime import date
from pathlib import Path

import pytest

from pipeline.config.loader import load_job
from pipeline.config.secret_names import names_secret
from pipeline.config.variables import Variables
from pipeline.core.errors import JobError

SECRETS = (
    "AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN HF_TOKEN HUGGING_FACE_HUB_TOKEN GITHUB_TOKEN TOKEN "
    "MY_TOKEN_2 API_KEY OPENAI_API_KEY APIKEY X_APIKEY AZURE_STORAGE_KEY AZURE_STORAGE_ACCOUNT_KEY "
    "AZURE_STORAGE_CONNECTION_STRING AZURE_CLIENT_SECRET GOOGLE_CREDENTIALS DB_PASSWORD PASSWORD PGPASSWD DB_PWD "
    "SSH_PRIVATE_KEY private_key secret my_secret_value KEY_PASSPHRASE AUTH_KEY SIGNING_KEY RAY_AUTH_TOKEN JWT BEARER "
    "PGPASSWORD REDISPASSWORD AWSSECRETACCESSKEY SECRETACCESSKEY awsSecretAccessKey ApiKey TOKEN2 HF_TOKEN_2 SECRET1 "
    "AWS_SECRET_ACCESS_KEY2 DB_PASS GCS_HMAC_KEY"
)
OTHERS = (
    "TOKENIZER TOKENIZER_PATH MAX_TOKENS MAX_NEW_TOKENS TOKENS KEY_COLUMN KEY ID_KEY PRIMARY_KEY SORT_KEY KEYS DATE "
    "TWOTOWER_OUT TWOTOWER_INPUT TWOTOWER_CHECKPOINT EOS_TOKEN STOP_TOKEN PAD_TOKEN MASK_TOKEN TOKEN_ID TOKEN_BUDGET "
    "MAX_TOKEN PWD OLDPWD SECRETARY PASSAGE ACCESS PRIVATE AUTHOR ACCOUNT_NAME SECRET_NAME SECRET_ARN CREDENTIALS_FILE "
    "AWS_SHARED_CREDENTIALS_FILE AWS_WEB_IDENTITY_TOKEN_FILE AWS_PROFILE AWS_ENDPOINT_URL MONKEY HOCKEY_TEAM BUCKET "
    "TOKEN_PREFIX SECRET_BUCKET TOKEN_DATASET TOKEN_LEN NEW_TOKEN PROMPT_TOKEN FIRST_PASS BYPASS N_PASS V2 2 _"
)


@pytest.mark.parametrize("name", SECRETS.split())
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize("name", OTHERS.split())
def test_names_of_other_things(name: str) -> None:
    assert not names_secret(name)


JOB = {"input.path": "/in", "output.path": "/out", "model.checkpoint": "builtin:noise"}


def load(folder: Path, **settings: str) -> None:
    file = folder / "job.yaml"
    file.write_text("{}")
    given = {**JOB, **settings}
    load_job(file, [f"{key}={value}" for key, value in given.items()])


@pytest.mark.parametrize(
    "setting",
    [
        {"name": "'night ${AWS_SECRET_ACCESS_KEY}'"},
        {"generation.stop": "['${AWS_SECRET_ACCESS_KEY}']"},
        {"input.template": "'{{ text }} ${AWS_SECRET_ACCESS_KEY}'"},
        {"input.id_column": "'${AWS_SECRET_ACCESS_KEY:-id}'"},
        {"output.path": "'/out/${AWS_SECRET_ACCESS_KEY}'"},
        {"output.path": "'s3://bucket/${AWS_SECRET_ACCESS_KEY}/'"},
        {"input.path": "'https://host/${AWS_SECRET_ACCESS_KEY}@x'"},
        {"model.checkpoint": "'https://user:x@host/${AWS_SECRET_ACCESS_KEY}'"},
        {"name": "'https://user:${AWS_SECRET_ACCESS_KEY}@host/'"},
    ],
)
def test_a_secret_in_a_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]
) -> None:
    """It would be written to plan.json, to the manifest and to the report. A default changes nothing about that."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Qz1Xy9")
    with pytest.raises(JobError, match="the variable AWS_SECRET_ACCESS_KEY looks like a secret, and every") as caught:
        load(tmp_path, **setting)
    assert "Qz1Xy9" not in str(caught.value)
    assert next(iter(setting)) in str(caught.value)


def test_user_and_password_of_a_web_server_may_be_variables() -> None:
    variables = Variables({"DB_PASSWORD": "p", "API_KEY": "k"}, date(2026, 1, 1))
    url = variables.fill("https://${API_KEY}:${DB_PASSWORD}@host/in/", "job.yaml: input.path", is_path=True)
    assert url == "https://k:p@host/in/"
    assert variables.fill("$${DB_PASSWORD}", "job.yaml: name") == "${DB_PASSWORD}"


@pytest.mark.parametrize("key", list(JOB))
@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYID:Qz1Xy9@bucket/x",
        "s3://KEYID:Qz1/Xy9+@bucket/x",
        "s3a://Qz1Xy9@bucket/x",
        "gs://user:Qz1Xy9@bucket",
        "abfss://user:Qz1Xy9@account.dfs.core.windows.net/x",
        "s3://KEYID:Qz1Xy9",
        "https://bucket.s3.amazonaws.com/x.parquet?X-Amz-Credential=KEYID&X-Amz-Signature=Qz1Xy9",
    ],
)
def test_credentials_in_the_url_of_an_object_store_are_refused(tmp_path: Path, key: str, url: str) -> None:
    """The message shows nothing of them, and says where they belong."""
    with pytest.raises(JobError, match=r"credentials (do not belong|in the environment)") as caught:
        load(tmp_path, **{key: f"'{url}'"})
    for secret in ("Qz1", "Xy9", "KEYID"):
        assert secret not in str(caught.value)
    assert "environment" in str(caught.value)


@pytest.mark.parametrize(
    "override", ["s3://KEYID:Qz1Xy9@bucket", "a.b.s3://KEYID:Qz1Xy9@bucket", "name.x=s3://K:Qz1Xy9@b"]
)
def test_a_malformed_override_does_not_show_them(tmp_path: Path, override: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x")
    with pytest.raises(JobError) as caught:
        load_job(file, [override])
    assert "Qz1Xy9" not in str(caught.value)


def test_a_job_file_behind_a_url_is_refused_without_its_secrets() -> None:
    with pytest.raises(JobError, match=r"^s3://bucket/job.yaml: a job file must be on this machine: copy it first$"):
        load_job("s3://KEYID:Qz1Xy9@bucket/job.yaml")
