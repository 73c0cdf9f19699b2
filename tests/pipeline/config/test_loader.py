"""Tests of the loading of a job file: it is taken as it is written, or refused in one line that names the key."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.requests import EngineLimits, GenerationParams
from pipeline.config.job import FlushSection, Job
from pipeline.config.loader import load_job, read_settings
from pipeline.core.errors import JobError

GOOD = """\
#!/usr/bin/env -S python -m pipeline run
input: {path: /data/in}
output: {path: /data/out}
model: {checkpoint: "builtin:noise"}
"""
JOBS = Path(__file__).parents[3] / "jobs"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "nice.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD))
    assert job.name == "nice"
    assert (job.input.prompt_column, job.input.template, job.input.carry) == ("prompt", None, ())
    assert job.generation.params((5,)).eos_ids == (5,)
    assert job.engine.limits().max_rows == 16
    assert (job.workers.replicas, job.workers.gpus) == ("auto", 2)


def test_all_engine_settings_reach_the_engine(tmp_path: Path) -> None:
    """max_rows may be left to the engine, in a file and with --set. The engine then also checks the number of lanes."""
    job = load_job(write(tmp_path, GOOD + "engine: {max_rows: auto, lanes: 40}\n"), ["engine.extend_every=3"])
    assert job.engine.limits() == EngineLimits(max_rows="auto", lanes=40, extend_every=3)
    assert load_job(write(tmp_path, GOOD), ["engine.max_rows=auto"]).engine.max_rows == "auto"


def test_a_job_is_frozen(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        job.output.rows_per_file = 3


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("engine: {max_row: 3}", "engine.max_row is not a key of a job; did you mean engine.max_rows?"),
        ("engines: {max_rows: 3}", "engines is not a key of a job; did you mean engine?"),
        ("seed: 3", "seed is not a key of a job; did you mean generation.seed?"),
        ("engine: {xyzzy: 3}", "engine.xyzzy is not a key of a job; known here: max_rows"),
        ('engine: {max_rows: "16"}', "engine.max_rows is '16': it must be a whole number, without quotes"),
        ("engine: {max_rows: 1.5}", "engine.max_rows is 1.5: it must be a whole number"),
        ("engine: {max_rows: true}", "engine.max_rows is True: it must be a whole number"),
        ("engine: {max_rows: 0}", "engine.max_rows is 0: it must be a whole number of at least 1"),
        ("engine: {max_rows: all}", "engine.max_rows is 'all': it must be a whole number, without quotes, or auto"),
        ("engine: {max_rows: 3, lanes: 4}", "engine.lanes is 4, above max_rows 3"),
        ("engine: {extend_every: 0}", "engine.extend_every is 0: it must be a whole number of at least 1"),
        (
            "engine: {max_prefill_tokens: 63}",
            "engine.max_prefill_tokens is 63: it must be a whole number of at least",
        ),
        ("engine: {max_context_tokens: 9, kv_tokens: 4}", "engine.kv_tokens is 4, below max_context_tokens 9"),
        ("generation: {block_size: 0}", "generation.block_size is 0: it must be a whole number of at least 1"),
        ("generation: {confidence_threshold: 2}", "generation.confidence_threshold is 2.0: it must be a number from 0"),
        ("generation: {mode: magic}", "generation.mode is 'magic': input should be 'diffusion', 'ar' or 'mock_ar'"),
        ("generation: {temperature: .nan}", "generation.temperature is nan: it must be a finite number"),
        ("generation: {stop: END}", "generation.stop is 'END': it must be a list"),
        ("generation: {on_degenerate: drop}", "generation.on_degenerate is 'drop': input should be 'keep' or 'retry'"),
        ('generation: {eos_ids: ["3"]}', "generation.eos_ids.0 is '3': it must be a whole number"),
        ("workers: {replicas: many}", "workers.replicas is 'many': it must be a whole number of at least 1, or auto"),
        ("workers: {replicas: 0}", "workers.replicas is 0: it must be a whole number of at least 1, or auto"),
        ("workers: {gpus: -1}", "workers.gpus is -1: input should be greater than or equal to 0"),
        ("retry: {max_error_rate: 2}", "retry.max_error_rate is 2"),
        ("retry: [1]", "retry is [1]: it must be a section with keys of its own"),
        ("name: 7", "name is 7: it must be text"),
        ("model: {checkpoint: x}", "line 5: model is given twice: keep one of them"),
        ("engine: {max_rows: 3, max_rows: 4}", "line 5: engine.max_rows is given twice"),
        ("engine: [", "line 6: not YAML"),
        ("engine: {max_rows: ${X}}", "put a value with ${…} in quotes"),
        ('template: "a {{ row["b c"] }}"', "inside \"…\" write '…' in the template"),
        ('template: "a {{ x | default("b") }}"', "inside \"…\" write '…' in the template"),
        ("generation: {{ text }}", "line 5: a key must be text; put the template in quotes"),
        ("template: {{ text }} more", "put the template in quotes"),
        ("template: Rewrite {{ text }}: now", "put the template in quotes"),
        ("template: {% if x %}{{ x }}{% endif %}", "put the template in quotes"),
        ("engine: {? [1] : 2}", "line 5: a key must be text"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "a is not a key of a job"),
        ('generation: {seed: !!int "abc"}', "line 5: generation.seed is 'abc': it cannot be read as int"),
        ("generation: {temperature: !!float abc}", "line 5: generation.temperature is 'abc': it cannot be read as"),
        ("name: !!bool maybe", "line 5: name is 'maybe': it cannot be read as bool"),
        ("name: !!timestamp abc", "line 5: name is 'abc': it cannot be read as timestamp"),
        ("generation: {seed: 0x_}", "line 5: generation.seed is '0x_': it cannot be read as int"),
        ("generation: {seed: 0b_}", "line 5: generation.seed is '0b_': it cannot be read as int"),
        ("generation: {seed: " + "1" * 5000 + "}", "line 5: generation.seed is '1111"),
        ("generation: {seed: " + "1" * 4000 + "}", "generation.seed is 1111"),
        ("generation: {seed: 010}", "generation.seed is '010': write the number without leading zeros"),
        ("generation: {seed: 09}", "generation.seed is '09': write the number without leading zeros"),
        ("generation:\n  seed: ${TT_UNSET:-010}", "generation.seed is '010': write the number without leading"),
        ('generation: {seed: !!int "010"}', "generation.seed is '010': write the number without leading zeros"),
        ('generation: {seed: !!int "1:30"}', "generation.seed is '1:30': write the number in decimal"),
        ("generation: {seed: 1:30}", "generation.seed is '1:30': it must be a whole number"),
        ("generation: {temperature: 1:30.5}", "generation.temperature is '1:30.5': it must be a number"),
        ("name: ${NOPE", "name is '${NOPE': ${ without }"),
        ("name: ${A:-${B:-c}}", "name is '${A:-${B:-c}}': a variable inside a variable"),
        ("generation:\n  seed: ${TT_UNSET:-" + "1" * 5000 + "}", "generation.seed is '1111"),
        ('name: "\\ud800"', "name holds characters that are not Unicode text (lone surrogate)"),
        ("y" * 500 + ": 1", "y… is not a key of a job"),
    ],
)
def test_faults_name_the_key_the_value_and_the_rule(tmp_path: Path, extra: str, said: str) -> None:
    message = refusal(tmp_path, GOOD + extra + "\n")
    assert said in message
    assert "nice.yaml" in message
    assert len(message) < 400


def test_missing_keys_are_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, "input: {path: a}\nmodel: {}\n")
    assert "output is missing" in message
    assert "model.checkpoint is missing" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n", "holds a list"),
        ("just words\n", "holds a text"),
        (b"name: \xff\n", "byte 6 is not UTF-8"),
        (b"name: \x01\n", "not YAML"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no such job file"):
        load_job(tmp_path / "absent.yaml")
    with pytest.raises(JobError, match="this is a folder"):
        load_job(tmp_path)


def test_prompt_column_or_template_but_not_both(tmp_path: Path) -> None:
    both = GOOD.replace("/data/in", "/data/in, prompt_column: p, template: '{{ a }}'")
    assert "keep one of them" in refusal(tmp_path, both)
    job = load_job(write(tmp_path, GOOD.replace("/data/in", "/data/in, template: '{{ a }}'")))
    assert (job.input.prompt_column, job.input.template) == (None, "{{ a }}")


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ a", "template, line 1"), ("{{ a | nosuch }}", "nosuch"), ("no column", "template reads no column")],
)
def test_a_template_is_checked_at_load(tmp_path: Path, template: str, said: str) -> None:
    assert said in refusal(tmp_path, GOOD.replace("/data/in", f"/data/in, template: '{template}'"))


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_ROWS", "7")
    monkeypatch.setenv("TT_NAME", "from the environment")
    monkeypatch.delenv("TT_UNSET", raising=False)
    text = GOOD + (
        'name: "${TT_NAME}"\nengine:\n  max_rows: ${TT_ROWS}\n'
        "generation:\n  seed: ${TT_UNSET:-12}\n  top_k: ${TT_UNSET:-null}\n  stop: ['$${x}', '${TT_UNSET:-}y']\n"
    )
    job = load_job(write(tmp_path, text))
    assert job.name == "from the environment"
    assert job.engine.max_rows == 7  # it is not quoted, so it becomes a number
    assert (job.generation.seed, job.generation.top_k) == (12, None)
    assert job.generation.stop == ("${x}", "y")


def test_a_quoted_variable_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_ROWS", "7")
    assert "without quotes" in refusal(tmp_path, GOOD + 'engine: {max_rows: "${TT_ROWS}"}\n')
    assert load_job(write(tmp_path, GOOD + 'name: "${TT_ROWS}"\n')).name == "7"


def test_an_unset_variable_names_itself_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TT_UNSET", raising=False)
    message = refusal(tmp_path, GOOD.replace("/data/in", "'${TT_UNSET}/in'"))
    assert "input.path" in message
    assert "TT_UNSET is not set" in message
    assert "is no variable" in refusal(tmp_path, GOOD.replace("/data/in", "'${not a name}'"))


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "generation.seed=3",
        "input.carry=[a, b]",
        "workers.replicas=2",
        "name=x=y",
        "generation.temperature=1e-1",
    ]
    job = load_job(write(tmp_path, GOOD), overrides)
    assert (job.generation.seed, job.input.carry, job.workers.replicas, job.name) == (3, ("a", "b"), 2, "x=y")
    assert job.generation.temperature == 0.1
    assert job.output.path == "/data/out"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("input.path.x=3", "input.path is not a section"),
        ("engine.max_rows=lots", "--set engine.max_rows is 'lots'"),
        ("engine.max_row=3", "did you mean engine.max_rows?"),
        ("input.carry=[", "--set input.carry"),
        ("input.path=", "input.path is None: it must be text"),
        ("generation.seed=" + "1" * 5000, "--set generation.seed, line 1 is '1111"),
        ("generation.seed=010", "'010': write the number without leading zeros"),
        ("generation" + "x" * 500, "x…: write it as section.key=value"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("extra", "overrides", "seconds", "rows"),
    [
        ("checkpoint: {seconds: 5, rows: 7}", [], 5, 7),
        ("checkpoint:\n  rows: ${TT_UNSET:-7}", [], 30, 7),
        ("", ["checkpoint.seconds=5"], 5, None),
        ("checkpoint: {rows: 10}", ["flush.seconds=5"], 5, 10),
        ("flush: {rows: 10}", ["checkpoint.seconds=5"], 5, 10),
        ("checkpoint:", ["flush.seconds=5"], 5, None),
        ("checkpoint: {seconds: 1, rows: 10}", ["checkpoint.seconds=2", "flush.rows=null"], 2, None),
        ("", ["flush.seconds=1", "checkpoint.seconds=2"], 2, None),
        ("", ["checkpoint.seconds=2", "flush.seconds=1"], 1, None),
        ("flush: {rows: 10}", ["checkpoint={seconds: 5}"], 5, None),
    ],
)
def test_checkpoint_is_the_old_name_of_flush(
    tmp_path: Path, extra: str, overrides: list[str], seconds: float, rows: int | None
) -> None:
    """The old name works in a file and on the command line, also together with the new name. The model's checkpoint is
    another key."""
    file = write(tmp_path, f"{GOOD}{extra}\n")
    job = load_job(file, overrides)
    assert job.flush == FlushSection(seconds=seconds, rows=rows)
    assert job.model.checkpoint == "builtin:noise"
    assert job == load_job(write(tmp_path, GOOD), [f"flush.seconds={seconds}.0", f"flush.rows={rows or 'null'}"])
    assert "checkpoint" not in job.model_dump()


def test_the_settings_of_a_file_stand_under_todays_keys_in_their_order(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, f"checkpoint: {{rows: 7}}\n{GOOD}"), ["flush.seconds=5"])
    assert list(settings) == ["flush", "input", "output", "model"]
    assert settings["flush"] == {"rows": 7, "seconds": 5}


@pytest.mark.parametrize("overrides", [[], ["flush.seconds=5"], ["checkpoint.seconds=5"]])
def test_a_file_with_the_old_and_the_new_name_is_refused(tmp_path: Path, overrides: list[str]) -> None:
    text = GOOD + "checkpoint: {rows: 10}\nflush: {seconds: 5}\n"
    said = "checkpoint and flush are both given: keep one of them; checkpoint is the old name of flush"
    assert refusal(tmp_path, text, *overrides) == f"{tmp_path}/nice.yaml: {said}"


@pytest.mark.parametrize(
    ("extra", "overrides", "said"),
    [
        ("flush: {rows: 0}", [], "flush.rows is 0: input should be"),
        ("checkpoint: {rows: 0}", [], "checkpoint.rows is 0: input should be"),
        ("checkpoint: {rows: 0}", ["flush.seconds=5"], "checkpoint.rows is 0: input should be"),
        ("flush: {rows: 0}", ["checkpoint.seconds=5"], "flush.rows is 0: input should be"),
        ("checkpoint: {rows: 7}", ["flush.rows=0"], "--set flush.rows is 0: input should be"),
        ("checkpoint: {rows: 7}", ["flush={rows: 0}"], "flush.rows is 0: input should be"),
        ("flush: {rows: 7}", ["checkpoint.rows=0"], "--set checkpoint.rows is 0: input should be"),
        ("flush: {rows: 7}", ["checkpoint={rows: 0}"], "checkpoint.rows is 0: input should be"),
        ("", ["checkpoint.seconds=soon"], "--set checkpoint.seconds is 'soon': it must be a number, without quotes"),
        ("", ["checkpoint=builtin:tiny"], "--set checkpoint is 'builtin:tiny': it must be a section with keys of its"),
        ("checkpoint: 5", [], "checkpoint is 5: it must be a section with keys of its own"),
        ("checkpoint:", [], "checkpoint is None: it must be a section with keys of its own"),
        ("checkpoint: {row: 7}", [], "checkpoint.row is not a key of a job; did you mean flush.rows?"),
        ("", ["checkpoint.row=7"], "--set checkpoint.row is not a key of a job; did you mean flush.rows?"),
        ("checkpoint: {rows: '${TT_UNSET}'}", [], "checkpoint.rows: the environment variable TT_UNSET is not set"),
        ("flush: 5", ["checkpoint.rows=7"], "--set checkpoint.rows=7: checkpoint is not a section"),
        ("seconds: 5", [], "seconds is not a key of a job; did you mean flush.seconds?"),
    ],
)
def test_faults_name_the_old_key_where_it_was_written(
    tmp_path: Path, extra: str, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TT_UNSET", raising=False)
    message = refusal(tmp_path, f"{GOOD}{extra}\n", *overrides)
    assert message.removeprefix(f"{tmp_path}/nice.yaml: ").startswith(said)


def test_a_job_from_python_or_a_record_may_use_the_old_name() -> None:
    sections = {"input": {"path": "i"}, "output": {"path": "o"}, "model": {"checkpoint": "c"}}
    job = Job.model_validate({**sections, "flush": {"rows": 7}})
    assert Job.model_validate({**sections, "checkpoint": {"rows": 7}}) == job
    assert Job.model_validate({**sections, "checkpoint": FlushSection(rows=7)}) == job
    text = job.model_dump_json()
    assert Job.model_validate_json(text.replace('"flush"', '"checkpoint"')) == job
    with pytest.raises(ValueError, match="checkpoint and flush are both given: keep one of them"):
        Job.model_validate({**sections, "checkpoint": {}, "flush": {}})


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "input: {path: data/*.parquet}\noutput: {path: out/}\nmodel: {checkpoint: ckpt}\n"
    job = load_job(write(tmp_path, text))
    assert job.input.path == f"{tmp_path}/data/*.parquet"
    assert job.output.path == f"{tmp_path}/out"
    assert job.model.checkpoint == f"{tmp_path}/ckpt"
    urls = load_job(
        write(tmp_path, text), ["input.path=s3://b/in/", "output.path=s3://b/out", "model.checkpoint=builtin:noise"]
    )
    assert (urls.input.path, urls.output.path) == ("s3://b/in/", "s3://b/out")
    assert urls.model.checkpoint == "builtin:noise"


def test_a_relative_output_inside_rays_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert "deleted after the job" in refusal(tmp_path, GOOD.replace("/data/out", "out"))
    assert load_job(write(tmp_path, GOOD.replace("/data/in", "in"))).input.path == str(inside / "in")


def test_messages_hide_credentials(tmp_path: Path) -> None:
    url = "s3://key:hidden@host/x"
    for more in (f"retry: {url}\n", f"retry: [{{a: {url}}}]\n", f"{url}: 1\n"):
        message = refusal(tmp_path, GOOD + more)
        assert "s3://host/x" in message
        assert "hidden" not in message
    assert "hidden" not in refusal(tmp_path, GOOD + "retry: s3://key:hidden@host/x?token=hidden\n")


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(min_size=1).filter(lambda text: "${" not in text and text.isprintable()),
    carry=st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), max_size=4),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0, 100, allow_nan=False),
    top_k=st.none() | st.integers(0, 1000),
)
def test_what_is_written_is_what_is_read(
    tmp_path: Path, name: str, carry: list[str], seed: int, temperature: float, top_k: int | None
) -> None:
    """Any values that YAML can hold come back unchanged, from a file and from overrides."""
    fields = {"seed": seed, "temperature": temperature, "top_k": top_k}
    body = yaml.safe_dump({"name": name, "generation": fields}, allow_unicode=True)
    job = load_job(write(tmp_path, GOOD + body), [f"input.carry={carry}"])
    assert job.name == name
    assert job.input.carry == tuple(carry)
    assert (job.generation.seed, job.generation.temperature, job.generation.top_k) == (seed, temperature, top_k)
    assert Job.model_validate(job.model_dump()) == job


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_no_file_escapes_the_exception_tree(tmp_path: Path, text: str | bytes) -> None:
    """A file without the required keys raises a JobError of one line, whatever bytes it holds."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    with pytest.raises(JobError) as caught:
        load_job(write(tmp_path, data))
    assert "\n" not in str(caught.value)


SHIPPED = sorted(JOBS.glob("*.yaml"))


def test_jobs_are_shipped() -> None:
    assert {"demo.yaml", "nightly.yaml", "synth.yaml"} <= {file.name for file in SHIPPED}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_jobs_parse_and_can_be_run_as_programs(file: Path) -> None:
    """`ray job submit -- jobs/x.yaml` runs the file itself, so it needs the shebang and the run bit."""
    assert re.fullmatch(rf"{file.stem}(-\d{{4}}-\d\d-\d\d)?", load_job(file).name or "")
    assert file.read_text().splitlines()[0] == "#!/usr/bin/env -S python -m pipeline run"
    assert os.access(file, os.X_OK)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_git_keeps_the_run_bit(file: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "--", file.name], cwd=JOBS, capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("not tracked by git here (a source archive, or not committed yet)")
    assert listed.startswith("100755")


def test_every_field_is_explained() -> None:
    """The schema is the documentation, so every key must have a description."""
    for name, definition in [("Job", Job.model_json_schema()), *Job.model_json_schema()["$defs"].items()]:
        for field, schema in definition["properties"].items():
            is_section = "$ref" in schema
            assert is_section or schema.get("description"), f"{name}.{field}"


def test_the_production_job_shows_every_setting() -> None:
    """`template` and `messages_column` are in comments of that file, because they exclude prompt_column."""
    text = (JOBS / "synth.yaml").read_text()
    for name in ("template", "messages_column", "system"):
        text = text.replace(f"# {name}:", f"{name}:")
    shown = yaml.safe_load(text)

    def names(settings: Any) -> Any:
        return {name: names(value) for name, value in settings.items()} if isinstance(settings, dict) else None

    sections = {"input": {"path": "i"}, "output": {"path": "o"}, "model": {"checkpoint": "c"}}
    assert names(shown) == names(Job.model_validate(sections).model_dump())


def test_job_sections_have_the_engines_own_defaults() -> None:
    """A setting that is not in the job file has the engine's own default: there is no second set of defaults."""
    job = Job.model_validate({"input": {"path": "i"}, "output": {"path": "o"}, "model": {"checkpoint": "c"}})
    assert job.generation.params(default_eos=()) == GenerationParams()
    assert job.engine.limits() == EngineLimits()
