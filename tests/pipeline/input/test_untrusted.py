"""Tests that input from strangers (job files, metadata, names) runs no code, and that its readers refuse but never
break."""

import ast
import os
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.loader import load_job
from pipeline.core.errors import InputError, JobError
from tests.fuzz.targets import TARGETS
from tests.pipeline.cases import make_job, plan_of, run, write
from tests.pipeline.prompts.test_templates import rendered

ROOT = Path(__file__).parents[3]

# ---- data is never run as code

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
UNSAFE_CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.load", "np.load"}
UNSAFE_CALLS |= {"numpy.load", "eval", "exec", "os.system", "os.popen", "subprocess.getoutput"}
PACKAGES = ("pipeline", "workers", "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [file for top in PACKAGES for file in (ROOT / top).rglob("*.py")], ids=lambda f: str(f.relative_to(ROOT))
)
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS, node.lineno
            assert not any(word.arg in ("shell", "allow_pickle") for word in node.keywords), node.lineno


def test_metadata_of_a_file_runs_nothing(tmp_path: Path) -> None:
    """The file holds pickled classes in its pandas metadata and in an extension type; older readers would unpickle
    them."""
    mark = tmp_path / "executed"
    attack = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": attack}
    schema = pa.schema(
        [pa.field("prompt", pa.string(), metadata=kind)], metadata={b"pandas": attack, b"pickle": attack}
    )
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x"]}, schema=schema), file)
    job = make_job(file, tmp_path / "out", input={"carry": ["prompt"]})
    with suppress(InputError):
        run(job)
    assert not mark.exists()


# ---- job files

GOOD = 'input: {path: /in}\noutput: {path: /out}\nmodel: {checkpoint: "builtin:noise"}\n'


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    file = tmp_path / "j.yaml"
    file.write_text(text)
    with pytest.raises(JobError) as caught:
        load_job(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tag", ["python/object/apply:os.system", "python/name:os.system", "python/object/new:type"])
def test_tags_make_no_objects(tmp_path: Path, tag: str) -> None:
    assert "it must be" in refused(tmp_path, GOOD + f"name: !!{tag} ['touch {tmp_path}/executed']\n")
    assert "not YAML: could not determine a constructor" in refused(
        tmp_path, GOOD + f"name: !!{tag} 'touch {tmp_path}/executed'\n"
    )
    assert not (tmp_path / "executed").exists()


def test_aliases_of_aliases_are_bounded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "more than 10000 values" in refused(tmp_path, "\n".join(lines))


def test_a_job_file_without_end(tmp_path: Path) -> None:
    assert "more than 4000000 characters: is it a job file?" in refused(tmp_path, GOOD + "# " + "x" * 4_000_000)
    with pytest.raises(JobError, match="more than 4000000 characters"):
        load_job("/dev/zero")


@pytest.mark.slow
def test_a_variable_brings_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text from the environment is not read as YAML, as further variables or as Python. A template in it is sandboxed
    like any other."""
    monkeypatch.setenv("TT_EVIL", "{{ x.__class__ }}${HOME}\n!!python/name:os.system")
    file = tmp_path / "j.yaml"
    file.write_text(GOOD.replace("{path: /in}", '{path: /in, template: "${TT_EVIL}"}'))
    job = load_job(file)
    assert job.input.template == os.environ["TT_EVIL"]
    ((prompt, reason),) = rendered(str(job.input.template), x=["a"])
    assert prompt is None
    assert "unsafe" in str(reason)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.checkpoint=zip://x::http://host/y.zip", "a URL inside a URL (::) is not supported"),
        ("model.checkpoint=simplecache::s3://b/x", "a URL inside a URL (::) is not supported"),
        ("model.checkpoint=zip::/x", "a URL inside a URL (::) is not supported"),
        ("input.path=filecache::s3://b/x", "a URL inside a URL (::) is not supported"),
        ("output.path=zip://a::file:///b", "a URL inside a URL (::) is not supported"),
        ("input.path=s3://b/a/../c", ". and .. have no meaning in a URL"),
        ("output.path=s3://b/./c", ". and .. have no meaning in a URL"),
        ('output.path="/a\\nb"', "it holds a control character"),
        ('input.path="s3://b/\\0"', "it holds a control character"),
        ("output.path=/out/[a]*", "readers take *, ? and [ for patterns"),
    ],
)
def test_paths_that_are_refused(tmp_path: Path, override: str, said: str) -> None:
    message = refused(tmp_path, GOOD, override)
    assert said in message
    assert f"--set {override.partition('=')[0]}" in message or "output.path" in message


# ---- names

NAMES = [
    *("with space", "a#b", "50%", "%2e%2e", "what?x", "c:d", "back\\slash", "'quote\"", "semi;colon&", "~", "-dash"),
    *(
        "gr\u00f6\u00dfe",
        "gro\u0308\u00dfe",
        "\u202eright-to-left",
        "\u0645\u0631\u062d\u0628\u0627",
        "\U0001f600",
        "a..b",
    ),
    "n" * 247,
]


@pytest.mark.slow
def test_odd_names_work_from_plan_to_duckdb(tmp_path: Path) -> None:
    """Folders and files with odd names, all in one job, are planned, read, named in source_file, and read back by
    DuckDB."""
    for number, name in enumerate(NAMES):
        write(tmp_path / "in" / name / f"{name}.parquet", prompt=[f"p{number}"])
    for output in ("out #1 50%", "\U0001f600 gr\u00f6\u00dfe", "o" * 250):
        run(make_job(tmp_path / "in", tmp_path / output))
        found = duckdb.execute(f"SELECT source_file, completion FROM '{tmp_path / output}/part-*.parquet'").fetchall()
        assert dict(found) == {f"{name}/{name}.parquet": f"answer to p{i}" for i, name in enumerate(NAMES)}


def test_dots_in_a_local_path_lead_where_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"])
    (tmp_path / "j.yaml").write_text(GOOD.replace("/in}", "sub/../in}").replace("/out}", "./../out}"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    job = load_job("j.yaml")
    assert (job.input.path, job.output.path) == (str(tmp_path / "in"), str(tmp_path.parent / "out"))
    assert plan_of(job).files[0].name == "a.parquet"


def test_a_name_with_a_line_break_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "in/a\nb.parquet", prompt=["x"])
    with pytest.raises(InputError) as caught:
        plan_of(make_job(tmp_path / "in", tmp_path / "out"))
    assert str(caught.value).endswith(r"a\nb.parquet is a name with a control character: rename it")


# ---- fuzzing without coverage, for seconds; tests.fuzz.run fuzzes for minutes


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    edit = st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8))

    def apply(seed: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
        for place, drop, put in edits:
            at = int(place * len(seed))
            seed = seed[:at] + put + seed[at + drop :]
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=6)) | st.binary(max_size=64)


EXAMPLES = {"job": 60, "template": 150, "prompt": 6, "input": 100}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_readers_of_foreign_bytes_refuse_and_never_break(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        target.run(seed)

    @settings(
        max_examples=EXAMPLES.get(name, 200),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=mutated(target.seeds()))
    def fuzz(data: bytes) -> None:
        target.run(data)

    fuzz()
