"""Builds the models of an on-policy run (its roles: reference, DPO model, judge and critic) over the weights from which
the policy started.

A path to an adapter without a model, such as `adapter/` of a run with `use_peft`, makes a role: an adapter (and for
scores a head) around the tensors of the base model. Each role has its own modules around the shared tensors, so it only
needs memory for its adapter and head, and no adapter has to be switched on and off. A path to a whole model makes a
separate model.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig, TrainConfig
from fastrlhf.models.adapter_targets import modules_to_save
from fastrlhf.models.adapters import (
    SCORE,
    adapter_weights,
    base_fingerprint,
    frozen_copy,
    frozen_tensors,
    has_adapter,
    inject,
    merged_copy,
    shared_view,
)
from fastrlhf.models.attention import run_like
from fastrlhf.models.forward import enable_activation_checkpointing
from fastrlhf.models.four_bit import is_four_bit
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import float_score_head, load_policy, make_trainable, resolve_device
from fastrlhf.models.offload import HOST
from fastrlhf.models.parts import whole_weight
from fastrlhf.models.probe import check_packed_forward
from fastrlhf.models.reward_head import scorer_class

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)

HEADS = ("score", "classifier")
"""Names of heads that peft writes into the settings of every sequence classifier."""


def holds_adapter(source: str) -> bool:
    """Returns whether `source` is a folder with an adapter but no model."""
    return (Path(source) / "adapter_config.json").exists() and not (Path(source) / "config.json").exists()


def is_reward_adapter(source: str, field: str) -> bool:
    """Returns whether the adapter in a folder belongs to a reward model. Raises ValueError, naming `field`, if it
    cannot be read."""
    return SCORE in _read(source, field)[0]


def unmerged_adapter(source: str, dtype: str) -> str:
    """Returns the folder of a run's adapter if the merged weights of the run are rounded, because they are in bfloat16
    on disk or would be loaded in bfloat16. Empty if they are exact or there is no adapter."""
    folder = Path(source)
    if not (folder / "adapter" / "adapter_config.json").exists() or not (folder / "config.json").exists():
        return ""
    try:
        saved = str(json.loads((folder / "config.json").read_bytes()).get("dtype"))
    except (ValueError, AttributeError):
        saved = ""
    return "" if saved == dtype == "float32" else str(folder / "adapter")


def open_base(config: TrainConfig, sources: Sequence[tuple[str, str]]) -> PreTrainedModel | None:
    """Loads the frozen causal LM under the adapters in `sources`, pairs of (key, path); None if no path is an adapter.

    It is the model of `model_name_or_path` or, if this is empty, the model that the first adapter names as its base. It
    is loaded in 4 bits if the adapter was trained over 4 bits. Raises ValueError if an adapter cannot be read or names
    no model, or if there is no such model.
    """
    adapters = [(field, source) for field, source in sources if holds_adapter(source)]
    if not adapters:
        return None
    field, source = adapters[0]
    base = config.model_name_or_path or adapter_settings(source, field).base_model_name_or_path
    if not base:
        raise ValueError(f"{field}: {source!r} is an adapter that does not name its base model; set model_name_or_path")
    _, metadata = _read(source, field)
    return load_policy(
        base,
        device=resolve_device(config.device),
        dtype=config.dtype,
        load_in_4bit=metadata.get("load_in_4bit") == "true",
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    ).requires_grad_(False)


def adapter_settings(source: str, field: str) -> LoraConfig:
    """Reads the LoraConfig of the adapter in a folder, for use as a role. Raises ValueError, naming `field`, if the
    adapter is not a LoRA."""
    from peft import LoraConfig, PeftConfig

    settings = PeftConfig.from_pretrained(source)
    if not isinstance(settings, LoraConfig):
        raise ValueError(f"{field}: {source!r} holds an adapter of type {settings.peft_type}; only LoRA is supported")
    # The head is loaded separately; dropout would make log-probs of the same tokens differ between passes.
    saved = [name for name in settings.modules_to_save or () if name not in HEADS]
    settings.modules_to_save, settings.lora_dropout, settings.inference_mode = saved or None, 0.0, False
    return settings


def policy_role(source: str, base: PreTrainedModel, field: str) -> PreTrainedModel:
    """Builds the causal LM that consists of the frozen `base`, whose weights it shares, and the adapter in the folder
    `source`.

    Only the adapter, and the modules that were trained with it, have gradients. Raises ValueError, naming `field`, if
    the adapter is not a LoRA, was trained over another base, does not fit, or belongs to a reward model.
    """
    return _with_adapter(shared_view(base), source, base, field)


def score_role(source: str, base: PreTrainedModel, field: str, pad_token_id: int | None) -> PreTrainedModel:
    """Builds the reward model that consists of the backbone of the frozen causal LM `base`, whose weights it shares,
    and the adapter in the folder `source` with its score head.

    Only the adapter and the head have gradients; the head runs in float32. Raises ValueError, naming `field`, in
    the cases of `policy_role`, and also if the adapter has no score head.
    """
    model = _with_adapter(_scorer_over(base, pad_token_id, source, field), source, base, field)
    model.score.requires_grad_(True)
    run_like(model, base)
    check_packed_forward(model)
    return model


def judge_and_critic(config: PPOConfig, reward_model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns the frozen judge and the trainable critic, which start from the same reward model and share the weights
    that are not trained.

    With `use_peft` the critic trains the adapter of the reward model or, if it has none, a new adapter. Without
    `use_peft` it trains all weights.
    """
    if not has_adapter(reward_model):
        make_trainable(reward_model, config, config.reward_model_path)
        return frozen_copy(reward_model), reward_model
    judge = shared_view(reward_model).requires_grad_(False)
    return judge, critic_from(config, reward_model, config.reward_model_path)


def critic_from(config: PPOConfig, scorer: PreTrainedModel, source: str) -> PreTrainedModel:
    """Returns the trainable critic made from a model with a score head that was loaded from `source`, as in
    `judge_and_critic`."""
    if not has_adapter(scorer):
        make_trainable(scorer, config, source)
        return scorer
    critic = scorer
    if not config.use_peft:
        critic = merged_copy(scorer).to(scorer.device)  # pyright: ignore[reportArgumentType] (as there)
    if config.activation_checkpointing:
        enable_activation_checkpointing(critic, offload_to=HOST if config.activation_offloading else None)
    return critic


def new_critic(config: PPOConfig, base: PreTrainedModel, pad_token_id: int | None) -> PreTrainedModel:
    """Returns a trainable critic that starts from the backbone of the frozen causal LM `base` and has the value 0 in
    every state.

    With `use_peft` it shares the weights of `base` and trains an adapter; otherwise it trains a copy of the weights.
    """
    critic = _scorer_over(base, pad_token_id, config.model_name_or_path, "model_name_or_path", shared=config.use_peft)
    torch.nn.init.zeros_(cast(torch.nn.Linear, critic.score).weight)
    critic = critic.requires_grad_(not config.use_peft).eval()
    run_like(critic, base)
    check_packed_forward(critic)
    make_trainable(critic, config, config.model_name_or_path)
    critic.score.requires_grad_(True)
    return critic


def policy_to_refine(config: PPOConfig, base: PreTrainedModel, given: PreTrainedModel | None) -> PreTrainedModel:
    """Returns the DPO model to train during the run. It starts from `given` or, if that is None, from the frozen causal
    LM `base`.

    If `use_peft` is true, only an adapter is trained: the adapter of `given`, or a new one if `given` has none. If
    `given` is None, the new adapter is added to `base`, whose weights are shared. If `use_peft` is false, all weights
    are trained, and none are shared.
    """
    if given is None:
        given = shared_view(base) if config.use_peft else frozen_copy(base)
        given = given.requires_grad_(not config.use_peft).eval()
        run_like(given, base)
    if not has_adapter(given):
        make_trainable(given, config, config.dpo_model_path or config.model_name_or_path)
        return given
    if not config.use_peft:
        given = merged_copy(given).to(given.device)  # pyright: ignore[reportArgumentType] (as there)
    if config.activation_checkpointing:
        enable_activation_checkpointing(given, offload_to=HOST if config.activation_offloading else None)
    return given


def _scorer_over(
    base: PreTrainedModel, pad_token_id: int | None, source: str, field: str, *, shared: bool = True
) -> PreTrainedModel:
    """Returns a sequence classifier with one score around the backbone of a frozen causal LM, whose weights are shared
    or copied. Its head, in float32, is not initialised."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    with torch.device("meta"):
        model = cast(Any, scorer_class(config)(config))
    # The layers must read the configuration of the new model.
    known: dict[int, Any] = {**frozen_tensors(base)} if shared else {}
    known |= {id(base.config): model.config}
    known |= {id(getattr(base.config, name)): getattr(model.config, name) for name in base.config.sub_configs}
    backbone = copy.deepcopy(base.base_model, known)
    setattr(model, model.base_model_prefix, backbone)
    model.is_loaded_in_4bit = is_four_bit(base)  # peft reads this attribute
    float_score_head(model, source, field).to_empty(device=base.device)
    return model


def _with_adapter(model: PreTrainedModel, source: str, base: PreTrainedModel, field: str) -> PreTrainedModel:
    settings = adapter_settings(source, field)
    saved, metadata = _read(source, field)
    _check_base(source, field, settings.base_model_name_or_path, metadata, base)
    if (SCORE in saved) != hasattr(model, "score"):
        wrong = "has no trained score head; train one with `fastrlhf reward`"
        raise ValueError(f"{field}: {source!r} {'is a reward model' if SCORE in saved else wrong}")
    settings.modules_to_save = modules_to_save(model, settings.modules_to_save or ()) or None
    _own_copies(model, settings.modules_to_save or ())
    inject(settings, model, seed=0)
    own = adapter_weights(model)
    for name in sorted(set(own) ^ set(saved)):
        where = "its settings but not its weights" if name in own else "its weights but not a part of a LoRA"
        raise ValueError(f"{field}: {source!r} does not fit: {name} is in {where}; give the folder of the whole model")
    with torch.no_grad():
        for name, weight in own.items():
            if weight.shape != saved[name].shape:
                shapes = f"{list(saved[name].shape)} there and {list(weight.shape)} in the base"
                raise ValueError(f"{field}: {source!r} does not fit: {name} is {shapes}")
            weight.copy_(saved[name])
        for name, weight in own.items():  # a weight that two modules share was written twice
            if not torch.equal(weight, saved[name].to(weight.device, weight.dtype)):
                raise ValueError(f"{field}: {source!r} does not fit: {name} is tied to another weight in the base")
    num = sum(weight.numel() for weight in saved.values())
    log.info("%s: an adapter of %.3g parameters over the weights of %s", field, num, base.name_or_path)
    return model.eval()


def _own_copies(model: PreTrainedModel, modules: Sequence[str]) -> None:
    """Replaces the weights of these modules, which the model shares with the base, by copies; tied weights stay
    tied."""
    copies: dict[int, torch.nn.Parameter] = {}
    for name in modules:
        for part in model.get_submodule(name).modules():
            for key, weight in list(part.named_parameters(recurse=False)):
                copied = torch.nn.Parameter(whole_weight(weight).detach().clone())
                setattr(part, key, copies.setdefault(id(weight), copied))


def _read(source: str, field: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the weights of an adapter and, if fastrlhf wrote it, the metadata about its base weights."""
    try:
        with safe_open(Path(source) / "adapter_model.safetensors", "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no mapping)
            return weights, content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{field}: the weights of {source!r} cannot be loaded: {error}") from error


def _check_base(source: str, field: str, named: str | None, metadata: dict[str, str], base: PreTrainedModel) -> None:
    """Raises ValueError if the base of an adapter is not the base of the run. An adapter of another program has no
    fingerprint, so only the name of its base is compared."""
    here, fingerprint = base.name_or_path or "model_config", metadata.get("base")
    own = "true" if is_four_bit(base) else "false"
    if (then := metadata.get("load_in_4bit", own)) != own:
        raise ValueError(
            f"{field}: {source!r} was trained with load_in_4bit: {then}, but this run has load_in_4bit: {own}; "
            f"set load_in_4bit to {then}, or set {field} to the output folder of the run that trained it, which "
            "contains the full model"
        )
    same = base_fingerprint(base) == fingerprint if fingerprint else _same_place(named or "", here)
    if not same:
        raise ValueError(
            f"{field}: {source!r} was trained over the weights of {named!r}, but the policy of this run starts from "
            f"the weights of {here!r}; use a model_name_or_path with the same weights, or set {field} to the output "
            "folder of the run that trained it, which contains the full model"
        )


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())
