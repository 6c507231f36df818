"""Compares the configuration of a run with the one that an earlier run in its folder wrote."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastrlhf.config.batch import BATCH_KEYS, batch_written
from fastrlhf.config.files import ALIASES, load_yaml, plain
from fastrlhf.config.paths import as_number, filled_in, is_same, leads_to, written_places
from fastrlhf.config.schedule import ENDLESS
from fastrlhf.config.train import HUB_KEYS, TrainConfig

SAME_MODEL = (
    *("output_dir", "run_name", "report_to", "progress", "logging_steps", "ref_cache_dir", "device"),
    "profile_steps",
    *("dataset_num_proc", "dataset_cache_dir"),
    *("micro_batch_tokens", "rollout_batch_size", "decode", "ref_reward_offload"),
    *("activation_checkpointing", "activation_offloading", "attn_implementation", "torch_compile", "use_liger_kernel"),
    *("save_steps", "save_total_limit", "disk_wait_minutes", "resume_from_checkpoint", "resume_weights_only"),
    *("resume_changed_functions", "push_to_hub", *HUB_KEYS),
)
"""Keys that do not change the final model, only where a run writes, how fast it is and what it shows."""


def check_unchanged(config: Any, section: str) -> None:
    """Raises ValueError if the finished run in `config.output_dir` had other settings.

    A folder without a config.yaml is accepted, because its model was not written by a run of this project.
    """
    written = Path(config.output_dir) / "config.yaml"
    before = _by_new_names(load_yaml(str(written))) if written.exists() else {}
    changed = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in plain(dataclasses.asdict(config)).items()
        if key not in (*SAME_MODEL, *BATCH_KEYS) and key in before and not is_same(key, before[key], value)
    ]
    if before:
        changed += [f"the batch of a step was {old} and is {new}" for old, new in _other_batch(config, before)]
    if changed:
        raise ValueError(
            f"{section}: {config.output_dir} holds a run with other settings: {', '.join(changed)}; give the section "
            "another output_dir, or remove the folder"
        )


def differences(config: Any, path: Path, ignored: Collection[str] = ()) -> list[str]:
    """Lists the differences between the resolved configuration in a file and `config`, for example "seed: 1 there, 2
    here".

    A key that is missing in the file, because a newer version added it, has its default there. Two paths are equal if
    they lead to the same place, also from another working directory. A larger number of steps is no difference if the
    learning rate does not depend on it. The keys of the batch count as different only if the number of rows of a step
    differs. Raises ValueError if the file does not hold a mapping.
    """
    there = _by_new_names(load_yaml(str(path)))
    here = plain(dataclasses.asdict(config))
    places = written_places(path.read_text(encoding="utf-8"))
    defaults = plain({field.name: field.default for field in fields(config)})
    return [f"batch of a step: {old} there, {new} here" for old, new in _other_batch(config, there)] + [
        f"{key}: {(old if old != new else places[key])!r} there, {(new if old != new else os.path.abspath(new))!r} here"
        for key in {**there, **here}
        for old, new in [(there.get(key, defaults.get(key, "absent")), here.get(key, "absent"))]
        if key not in (*ignored, *BATCH_KEYS)
        and not (_same(key, old, new, places.get(key)) or _longer(config, there, key))
    ]


def _same(key: str, old: Any, new: Any, place: Any) -> bool:
    """Returns whether two values are equal. `place` is the absolute path that a relative `old` led to, or None; from
    another working directory an equal text leads to another place."""
    if isinstance(place, str) and os.path.exists(place):
        return is_same(key, place, new)
    return is_same(key, old, new) or leads_to(key, new, place)


def _other_batch(config: Any, there: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the batch of a step in the file and in `config`, in words, if the numbers of rows differ; otherwise an
    empty list."""
    if not isinstance(config, TrainConfig):
        return []
    keys = {field.name: field.default for field in fields(config) if field.name in BATCH_KEYS}
    written = {key: int(as_number(filled_in(key, there.get(key, default)))) for key, default in keys.items()}
    old = batch_written(written)
    return [] if old == config.batch_size else [(f"{old} {config.UNIT}", config.describe_batch())]


def _longer(config: Any, there: Mapping[str, Any], key: str) -> bool:
    """Returns whether the change of this key only makes the run longer and leaves all past steps valid: neither the
    learning rate nor a curriculum depends on the number of steps."""
    old, new = there.get(key), getattr(config, key, None)
    return (
        key in ("max_steps", "num_train_epochs")
        and getattr(config, "lr_scheduler_type", "") in ENDLESS
        and not config.warmup_ratio
        and not getattr(config, "reset_curriculum", 0)
        and isinstance(old, int | float)
        and isinstance(new, int | float)
        and 0 < old < new
    )


def _by_new_names(written: dict[str, Any]) -> dict[str, Any]:
    """Replaces key names of the previous release, as its runs wrote them to config.yaml, by the present names."""
    return {ALIASES.get(key, key): value for key, value in written.items()}
