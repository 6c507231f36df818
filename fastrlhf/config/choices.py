"""Finds the choice that was probably meant by an invalid value of a key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

SPELLINGS = {
    **dict.fromkeys(("bf16", "bfloat", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "torch.float32"), "float32"),
    **dict.fromkeys(("false", "no", "off", "0", "null"), "none"),
    **dict.fromkeys(("true", "yes", "on", "1"), "group"),
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_hf", "adam"), "adamw_torch_fused"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
    "constant_with_warmup": "constant",
    **dict.fromkeys(("flash_attention", "flash_attn", "fa2"), "flash_attention_2"),
    "flex_attention": "flex",
    "eager": "sdpa",
    "dr-grpo": "dr_grpo",
}
"""Spelling of TRL, transformers or torch, in lower case -> choice here. It applies only to keys that have this
choice."""


class NoChoice(ValueError):
    """A value is none of the choices of its key; the message names the choices and the most likely one."""

    def __init__(self, key: str, value: object, choices: Sequence[object]) -> None:
        listed, meant = ", ".join(map(str, choices)), nearest_choice(value, choices)
        told = f"; did you mean {meant}?" if meant else ""
        super().__init__(f"{key}: must be one of {listed}; got {value!r}{told}")


def nearest_choice(value: object, choices: Sequence[object]) -> str:
    """Returns the choice that a value most likely means; empty if none is similar."""
    names, given = [str(choice) for choice in choices], str(value).lower().strip()
    if (known := SPELLINGS.get(given)) in names:
        return str(known)
    return next(iter(difflib.get_close_matches(given, names, 1)), "")
