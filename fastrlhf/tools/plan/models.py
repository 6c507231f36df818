"""Builds the models of a run without their data, and counts the bytes of each.

Models that are adapters are built from the adapter settings saved with their weights. Only the run itself checks that
they fit the base model of the policy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig, ReferenceConfig, RewardConfig, TrainConfig, parse_model_config, require
from fastrlhf.data.tokenizer import num_token_ids
from fastrlhf.models.four_bit import check_adapter, stored_in_four_bit
from fastrlhf.models.loading import read_model_config
from fastrlhf.models.roles import adapter_settings, holds_adapter
from fastrlhf.rewards.implicit import implicit_sources
from fastrlhf.tools.plan.memory import FakeModel, Fakes

DPO_NAMES = {"dpo_model_path": "DPO model", "dpo_ref_model_path": "DPO reference"}


@dataclass(kw_only=True)
class Models:
    start: PretrainedConfig
    """Configuration of the model that the run starts from."""
    trained: dict[str, FakeModel] = dataclasses.field(default_factory=dict)
    """Trained models, by name: "policy", "scorer" or "critic"."""
    frozen: dict[str, FakeModel] = dataclasses.field(default_factory=dict)
    """Frozen models, by the names that a plan prints."""
    own: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of weights of each trained or frozen model, by name, without weights shared with models listed earlier."""


def open_models(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, fakes: Fakes) -> Models:
    """Builds all models of a run. Raises ValueError, as the run would, for a model that is missing or does not fit the
    configuration."""
    start = _model_config(config, config.model_name_or_path, "model_name_or_path", tokenizer)
    if stored_in_four_bit(start, config.model_name_or_path, "model_name_or_path"):
        check_adapter(config.use_peft, config.model_name_or_path)
        config = dataclasses.replace(config, load_in_4bit=True)
        vars(start).pop("quantization_config")  # the plan quantises the model itself
    models = Models(start=start)
    name, make = ("scorer", fakes.scorer) if isinstance(config, RewardConfig) else ("policy", fakes.policy)
    _train(models, name, make(start, config, four_bit=config.load_in_4bit))
    if isinstance(config, ReferenceConfig) and not config.precompute_ref_log_probs:
        source = config.ref_model_name_or_path
        other = _model_config(config, source, "ref_model_name_or_path", tokenizer) if source else None
        shares = config.use_peft and other is None
        _freeze(models, "reference", fakes.policy(other or start, four_bit=shares and config.load_in_4bit), shares)
        if shares:
            _add_saved_modules(models, config)
    if isinstance(config, PPOConfig):
        _add_roles(models, config, tokenizer, fakes)
    return models


def _add_roles(models: Models, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, fakes: Fakes) -> None:
    start = models.start
    _freeze(models, "reference", fakes.policy(start, four_bit=config.load_in_4bit), config.use_peft)
    _add_saved_modules(models, config)

    def role(name: str, source: str, field: str) -> None:
        make = fakes.policy if name in DPO_NAMES.values() else fakes.scorer
        if holds_adapter(source):
            fake = make(start, adapter=adapter_settings(source, field), four_bit=config.load_in_4bit)
            models.frozen[name], models.own[name] = fake, fake.gradient_bytes
        else:
            _freeze(models, name, make(_model_config(config, source, field, tokenizer)))

    if config.reward_model_path:
        role("reward model", config.reward_model_path, "reward_model_path")
    if config.advantage_estimator == "gae":
        _add_critic(models, config, tokenizer, fakes)
    sources = implicit_sources(config)
    if config.dpo_refine != "none":
        _add_refined(models, config, tokenizer, fakes, sources.pop("dpo_model_path", ""))
    for field, path in sources.items():
        role(DPO_NAMES[field], path, field)
    if second := config.eval_reward_model_path:
        role("second reward model", second, "eval_reward_model_path")


def _add_saved_modules(models: Models, config: TrainConfig) -> None:
    """Adds the bytes of the reference's own copies of the modules in `lora_modules_to_save`."""
    if config.lora_modules_to_save:
        named = models.trained["policy"].model.named_parameters()
        copies = [x for name, x in named if x.requires_grad and ".lora_" not in name]
        models.own["reference"] += sum(x.numel() * x.element_size() for x in copies)


def _add_critic(models: Models, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, fakes: Fakes) -> None:
    field = "critic_model_path" if config.critic_model_path else "reward_model_path"
    source, start = getattr(config, field), models.start
    if not source:  # a copy of the policy with a new head; under an adapter it shares the reference's weights
        critic = fakes.scorer(start, config, four_bit=config.load_in_4bit)
        _train(models, "critic", critic)
        models.own["critic"] = critic.gradient_bytes if config.use_peft else critic.num_bytes
    elif not holds_adapter(source):
        _train(models, "critic", fakes.scorer(_model_config(config, source, field, tokenizer), config))
        if config.use_peft and field == "reward_model_path":
            models.own["reward model"] = 0  # it shares the weights under the critic's adapter
    elif config.use_peft:
        critic = fakes.scorer(start, config, adapter=adapter_settings(source, field), four_bit=config.load_in_4bit)
        models.trained["critic"], models.own["critic"] = critic, critic.gradient_bytes
    else:
        _train(models, "critic", fakes.scorer(start, config))  # the adapter is merged into a copy of the weights


def _add_refined(
    models: Models, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, fakes: Fakes, source: str
) -> None:
    """Adds the DPO model that the run trains (`dpo_refine`); without a `source` it starts from the policy."""
    name, start, four_bit = DPO_NAMES["dpo_model_path"], models.start, config.load_in_4bit
    if not source or holds_adapter(source):
        adapter = adapter_settings(source, "dpo_model_path") if source and config.use_peft else None
        fake = fakes.policy(start, config, adapter=adapter, four_bit=four_bit and config.use_peft)
        _train(models, name, fake)
        if config.use_peft:  # it shares the weights of the reference
            models.own[name] = fake.gradient_bytes
    else:
        _train(models, name, fakes.policy(_model_config(config, source, "dpo_model_path", tokenizer), config))


def _train(models: Models, name: str, fake: FakeModel) -> None:
    models.trained[name], models.own[name] = fake, fake.num_bytes


def _freeze(models: Models, name: str, fake: FakeModel, shares: bool = False) -> None:
    models.frozen[name], models.own[name] = fake, 0 if shares else fake.num_bytes


def _model_config(config: TrainConfig, source: str, field: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Returns the configuration of a model as the run will build it: with a vocabulary of at least the tokenizer's
    size."""
    if config.model_config and field == "model_name_or_path":
        require(not config.use_peft, "use_peft", True, "false with model_config: random weights need no adapter")
        fields = parse_model_config(config.model_config)
        try:
            model = AutoConfig.for_model(fields.pop("model_type"), **fields)
        except ValueError as error:
            raise ValueError(f"model_config.model_type: {error}") from error
        model.vocab_size, model.pad_token_id = num_token_ids(tokenizer), None
        return model
    require(bool(source), field, source, "a folder or a hub name")
    model = read_model_config(source, field, config.trust_remote_code)
    model.vocab_size, model.pad_token_id = max(model.vocab_size, num_token_ids(tokenizer)), None
    return model
