"""Tests that packs, shared prompts and checkpointing give transformers' numbers, for tiny models of common families.
`python -m bench models` runs the checks for all causal language models of transformers.
"""

import pytest

from bench.models.checks import Family, check_branched, check_checkpointing, check_packed, quiet
from fastrlhf.models.attention import runs_alone

TOGETHER = [
    "llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "phi3", "gpt_oss", "olmo2", "cohere2",
    "granite", "glm4", "gpt_neox", "opt", "smollm3", "deepseek_v3", "seed_oss", "gemma3n_text",
]  # fmt: skip
ALONE = ["qwen3_5_text", "qwen3_next", "llama4_text", "lfm2", "falcon_h1", "nemotron_h", "deepseek_v32", "falcon"]


@pytest.mark.parametrize("model_type", [*TOGETHER, *ALONE])
def test_a_family_gives_the_numbers_of_plain_transformers(model_type, tmp_path):
    with quiet():
        family = Family(model_type, tmp_path)
        assert bool(runs_alone(family.policy)) == (model_type in ALONE)
        for check in (check_packed, check_branched, check_checkpointing):
            check(family)  # raises an error if a number differs
