"""Tests what the engine refuses, and with which message: requests that could never run, and impossible limits and
settings."""

import pytest

from model import Engine, EngineLimits, GenerationParams, Request, RequestError, load_model
from model.network.two_tower import TwoTower


@pytest.fixture(scope="module")
def pair() -> TwoTower:
    return load_model("builtin:noise")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request("r", [], GenerationParams()), "no tokens"),
        (Request("r", [4, 260], GenerationParams()), "token id 260 is outside the vocabulary of 260"),
        (Request("r", [4] * 8000, GenerationParams()), "8000 prompt tokens and max_new_tokens 256 exceed .* 8192"),
        (Request("r", [4], GenerationParams(block_size=9000)), "block_size is 9000, above the context of 8192"),
    ],
)
def test_a_request_that_can_never_run_is_refused(pair: TwoTower, request_: Request, text: str) -> None:
    engine = Engine(pair)
    with pytest.raises(RequestError, match=text):
        engine.submit(request_)
    assert engine.waiting == 0


@pytest.mark.slow
def test_what_a_request_exceeds_is_named(pair: TwoTower) -> None:
    """A refusal names the context as the limit, whatever the number of rows. It names kv_tokens only if that was given
    and is smaller."""
    request = Request("r", [4] * 100, GenerationParams(max_new_tokens=100))
    for rows in (1, 7):
        with pytest.raises(RequestError, match="exceed the context of 150 tokens"):
            Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=150)).submit(request)
    with pytest.raises(RequestError, match=r"exceed engine\.kv_tokens of 128 tokens"):
        Engine(pair, EngineLimits(kv_tokens=128)).submit(request)


@pytest.mark.slow
def test_a_key_in_use_is_refused(pair: TwoTower) -> None:
    engine = Engine(pair)
    engine.submit(Request("same", [5], GenerationParams(max_new_tokens=1)))
    with pytest.raises(RequestError, match="'same'"):
        engine.submit(Request("same", [5], GenerationParams()))
    while engine.waiting or engine.active:
        engine.step()
    engine.submit(Request("same", [5], GenerationParams()))


@pytest.mark.slow
def test_generate_runs_all_or_none(pair: TwoTower) -> None:
    """If one request could never run, or a key is given twice, generate() queues nothing."""
    engine = Engine(pair)
    good, wrong = Request("a", [5], GenerationParams(max_new_tokens=1)), Request("b", [], GenerationParams())
    for requests, text in (([good, wrong], "no tokens"), ([good, good], "'a' is given 2 times")):
        with pytest.raises(RequestError, match=text):
            engine.generate(requests)
        assert engine.waiting == engine.active == 0
    engine.submit(good)
    with pytest.raises(RequestError, match="needs an engine without rows, but it holds 1"):
        engine.generate([Request("c", [5], GenerationParams())])
    assert [c.key for c in engine.step()] == ["a"] or engine.active == 1  # the row that was there is untouched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_rows": 0}, "max_rows is 0"),
        ({"max_prefill_tokens": True}, "max_prefill_tokens is True"),
        ({"kv_tokens": 64, "max_context_tokens": 128}, "kv_tokens is 64, below max_context_tokens 128"),
        ({"max_context_tokens": 100_000}, "max_context_tokens is 100000.*8192"),
    ],
)
def test_limits_that_cannot_be_are_refused(pair: TwoTower, limits: dict[str, int], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Engine(pair, EngineLimits(**limits))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "magic"}, "mode is 'magic': it must be one of diffusion, ar, mock_ar"),
        ({"block_size": 0}, "block_size is 0"),
        ({"confidence_threshold": 2}, "confidence_threshold is 2"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 1e39}, "temperature is 1e.39: it must be a number from 0 to"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"confidence_threshold": 10**400}, "confidence_threshold is 1000"),
        ({"eos_ids": [2**70]}, "eos_ids is"),
        ({"mode": ["ar"]}, "mode is"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"steps_per_block": False}, "steps_per_block is False"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**70}, "top_k is"),
        ({"steps_per_block": 2**31}, "steps_per_block is"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"eos_ids": 2}, "eos_ids is 2: it must be a list"),
        ({"stop": "x"}, "stop is 'x': it must be a list"),
        ({"stop": [""]}, "stop is"),
        ({"stop": ["x"] * 257}, "stop has more than 256 strings: give fewer"),
        ({"stop": ["y", "x" * 4097]}, "stop has a string of 4097 characters: at most 4096 are allowed"),
        ({"stop": ["x" * 500, ""]}, "stop is .{80}: it must be strings that are not empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        GenerationParams(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"key": None}, "request key is None: it must be a string"),
        ({"key": ["r"]}, "request key is .*: it must be a string"),
        ({"params": {"mode": "ar"}}, "request 'r': params is .*: it must be GenerationParams"),
        ({"prompt_ids": {5, 4}}, "request 'r': prompt_ids is .*: it must be a list"),
        ({"prompt_ids": {4: 5}}, "request 'r': prompt_ids is .*: it must be a list"),
        ({"prompt_ids": [4.0]}, "request 'r': the prompt must be a list of whole numbers"),
        ({"prompt_ids": None}, "request 'r': the prompt must be a list of whole numbers"),
        ({"prefix_tokens": True}, "request 'r': prefix_tokens is True"),
    ],
)
def test_requests_of_wrong_types_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Request(**{"key": "r", "prompt_ids": [4], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": ["float32"]}, "dtype is"),
        ({"devices": 1}, "devices is 1: it must be a list"),
        ({"devices": []}, "devices is .*: it must be a list"),
        ({"devices": [None]}, "device is None"),
        ({"devices": [1.5]}, "device is 1.5"),
    ],
)
def test_models_are_not_loaded_from_wrong_types(options: dict[str, object], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        load_model("builtin:noise", **options)  # type: ignore[arg-type]
