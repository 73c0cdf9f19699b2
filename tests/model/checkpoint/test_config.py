import json
import math

import pytest

from model.checkpoint.config import TwoTowerConfig, expected_tensors
from model.checkpoint.released import RELEASED
from model.errors import CheckpointError
from tests.model.golden_cases import CHECKPOINT


def config(**changes: object) -> TwoTowerConfig:
    return TwoTowerConfig.from_dict({**RELEASED, **changes})


def test_released_shape() -> None:
    released = config()
    assert released.num_layers == 52
    assert [len(released.layers_of(kind)) for kind in ("mamba", "moe", "attention")] == [23, 23, 6]
    assert (released.mamba_inner, released.conv_dim, released.in_proj_size) == (4096, 6144, 10304)
    assert released.attention_inner == 4096
    assert released.kv_inner == 256
    assert (released.mask_token_id, released.eos_token_ids, released.bos_token_id) == (3, (2,), None)
    assert released.time_step_limit == (0.0, math.inf)


def test_released_parameters_are_those_published() -> None:
    both = sum(math.prod(shape) for shape in expected_tensors(config()).values())
    context = sum(math.prod(shape) for shape in expected_tensors(config(), "context").values())
    assert context == pytest.approx(31.58e9, rel=1e-3)
    assert both == pytest.approx(63.2e9, rel=1e-3)


def test_the_golden_checkpoint_holds_exactly_the_expected_tensors() -> None:
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())
    golden = TwoTowerConfig.from_dict(raw)
    assert expected_tensors(golden).keys() == index["weight_map"].keys()
    assert golden.layer_kinds[:4] == ("mamba", "moe", "mamba", "attention")
    assert golden.in_proj_size == 328


@pytest.mark.parametrize(("raw", "ids"), [(7, (7,)), ([2, 11, 2], (2, 11)), (None, ()), ([], ())])
def test_eos_token_id_may_be_an_id_a_list_or_null(raw: object, ids: tuple[int, ...]) -> None:
    assert config(eos_token_id=raw).eos_token_ids == ids


@pytest.mark.parametrize("high", [math.inf, {"__float__": "Infinity"}])
def test_time_step_limit_may_be_infinite(high: object) -> None:
    assert config(time_step_limit=[0.001, high]).time_step_limit == (0.001, math.inf)


def test_mask_token_id_of_the_config_wins() -> None:
    assert config(mask_token_id=0).mask_token_id == 0
    assert config(mask_token_id=None).mask_token_id == 3


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("mlp_hidden_act", "silu", "relu2"),
        ("mamba_hidden_act", "gelu", "silu"),
        ("n_group", 2, "1"),
        ("topk_group", 4, "1"),
        ("n_shared_experts", 2, "1"),
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("use_bias", True, "False"),
        ("mamba_proj_bias", True, "False"),
        ("use_conv_bias", False, "True"),
        ("tie_word_embeddings", True, "False"),
        ("sliding_window", 4096, "None"),
        ("hybrid_override_pattern", "ME-M", "M .* E"),
        ("hybrid_override_pattern", "", "M, . and E"),
        ("hybrid_override_pattern", 3, "M, . and E"),
        ("num_hidden_layers", 51, "52 layers"),
        ("hidden_size", 0, "at least 1"),
        ("hidden_size", "2688", "at least 1"),
        ("n_groups", True, "at least 1"),
        ("mamba_num_heads", 63, "multiple of n_groups"),
        ("num_attention_heads", 33, "multiple of num_key_value_heads"),
        ("num_experts_per_tok", 129, "at most n_routed_experts"),
        ("conv_kernel", 1, "at least 2"),
        ("layer_norm_epsilon", 0, "above 0"),
        ("routed_scaling_factor", None, "number"),
        ("norm_topk_prob", "yes", "true or false"),
        ("time_step_limit", [0.1], "two numbers"),
        ("time_step_limit", [2.0, 1.0], "two numbers"),
        ("time_step_limit", [0.0, "inf"], "two numbers"),
        ("eos_token_id", 131072, "below vocab_size"),
        ("eos_token_id", [2, "3"], "below vocab_size"),
        ("mask_token_id", -1, "below vocab_size"),
        ("bos_token_id", 1.0, "below vocab_size"),
    ],
)
def test_what_is_not_supported_is_named(field: str, value: object, supported: str) -> None:
    with pytest.raises(CheckpointError, match=supported) as caught:
        config(**{field: value})
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [name for name in RELEASED if name not in ("num_hidden_layers", "eos_token_id")])
def test_a_missing_field_is_named(field: str) -> None:
    raw = {name: value for name, value in RELEASED.items() if name != field}
    with pytest.raises(CheckpointError, match=f"{field} is missing"):
        TwoTowerConfig.from_dict(raw)


def test_the_default_mask_id_needs_room_in_the_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="mask id is 3"):
        config(vocab_size=3)
