import pytest

from fastrlhf.models.positions import rope_obstacle
from tests import tiny


def config(kind: str, **parameters):
    made = tiny.model_config()  # a model with 128 positions
    made.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | parameters
    return made


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_fixed_frequencies_allow_packs(kind):
    assert rope_obstacle(config(kind), None) == ""


def test_longrope_prevents_packs_only_beyond_the_original_length():
    long = config("longrope", original_max_position_embeddings=64)
    assert rope_obstacle(long, 64) == ""
    for length in (65, None):
        told = "has longrope positions, which depend on the longest sequence once one has over 64 tokens"
        assert rope_obstacle(long, length) == told
    inner = config("longrope", original_max_position_embeddings=64)
    inner.rope_parameters = {"full_attention": inner.rope_parameters, "sliding_attention": {"rope_type": "default"}}
    assert "over 64 tokens" in rope_obstacle(inner, 100)


def test_dynamic_positions_are_refused_beyond_the_original_length():
    assert rope_obstacle(config("dynamic"), 128) == ""
    with pytest.raises(ValueError, match=r"^llama: rope_type dynamic .* set max_length to at most 128, or use another"):
        rope_obstacle(config("dynamic"), 129)
