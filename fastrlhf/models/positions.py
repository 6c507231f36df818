"""Finds rotary positions that depend on the longest sequence of a pass, which rules out packs."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def rope_obstacle(config: PretrainedConfig, max_length: int | None) -> str:
    """Returns, as a clause, why sequences of at most `max_length` tokens cannot share a pass; empty if they can.

    Up to the model's original length, the rope types `dynamic` and `longrope` have fixed frequencies. If any sequence
    of a pass is longer, `longrope` uses its long factors for the whole pass. The frequencies of `dynamic` then depend
    on all earlier passes, for which ValueError is raised. max_length None: any length.
    """
    text = config.get_text_config()
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        original = original or text.max_position_embeddings
        if max_length is not None and max_length <= original:
            continue
        if kind == "dynamic":
            raise ValueError(
                f"{config.model_type}: rope_type dynamic makes positions depend on earlier passes once a sequence is "
                f"longer than {original} tokens; set max_length to at most {original}, or use another rope_type"
            )
        return f"has longrope positions, which depend on the longest sequence once one has over {original} tokens"
    return ""


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Returns the rope parameters of a configuration, one mapping per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
