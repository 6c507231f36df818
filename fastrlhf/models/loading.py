"""Loads models by hub name or folder, or builds them from scratch. A model that cannot be trained correctly is
refused."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from torch.nn import Linear, Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastrlhf.config import TrainConfig, parse_model_config, require
from fastrlhf.config.elsewhere import nearest
from fastrlhf.data.hub import check_hub
from fastrlhf.data.specials import end_ids
from fastrlhf.data.tokenizer import is_missing_folder, num_token_ids
from fastrlhf.models.adapter_targets import check_new_rows
from fastrlhf.models.adapters import add_adapter, warn_if_rounded
from fastrlhf.models.architecture import check_decoder
from fastrlhf.models.forward import enable_activation_checkpointing
from fastrlhf.models.four_bit import check_trainable, keep_layout, quantization, stored_in_four_bit
from fastrlhf.models.layers import LayerOptions, prepare_layers
from fastrlhf.models.noise import silence, silent_config
from fastrlhf.models.offload import HOST, check_offloading
from fastrlhf.models.parts import loading_parts, make_whole
from fastrlhf.models.precision import DTYPES, resolve_device, with_dtype
from fastrlhf.models.probe import check_checkpointing, one_line
from fastrlhf.models.quiet import quiet
from fastrlhf.models.reward_head import scorer_class
from fastrlhf.models.router_loss import set_router_loss
from fastrlhf.models.shards import is_sharded, read_tensors
from fastrlhf.models.vocabulary import write_ends

log = logging.getLogger(__name__)

PLAIN = LayerOptions()


def open_policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Opens the model that `model_name_or_path` or `model_config` names, on the device of the run and ready to train.

    New tokens of the tokenizer get embeddings drawn with `seed`. Raises ValueError as `build_policy` and `load_policy`
    do, if neither or both keys are given, and for an adapter on a model from scratch.
    """
    config, device = with_dtype(config), resolve_device(config.device)
    if config.model_config:
        if config.model_name_or_path:
            raise ValueError("model_config: give either a model or a configuration to build one from, not both")
        require(not config.use_peft, "use_peft", True, "false with model_config: random weights need no adapter")
        model = build_policy(
            parse_model_config(config.model_config),
            vocab_size=num_token_ids(tokenizer),
            eos_token_id=end_ids(tokenizer)[0],
            seed=config.seed,
            device=device,
            dtype=config.dtype,
            layers=LayerOptions.of(config),
        )
    elif config.model_name_or_path:
        model = load_policy(
            config.model_name_or_path,
            device=device,
            dtype=config.dtype,
            load_in_4bit=config.load_in_4bit,
            trust_remote_code=config.trust_remote_code,
            layers=LayerOptions.of(config),
        )
    else:
        raise ValueError("model_name_or_path: give a folder or a hub name, or build a model from model_config")
    if vocabulary(model) < num_token_ids(tokenizer):
        new = num_token_ids(tokenizer) - vocabulary(model)
        if config.use_peft:
            check_new_rows(model, config.lora_modules_to_save, new)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                make_whole(module)
        model.tie_weights()
        with _seeded(config.seed, device):
            model.resize_token_embeddings(num_token_ids(tokenizer))
        log.warning(
            "tokenizer_name_or_path: %d rows added to the embedding of the model, for tokens that are new to it", new
        )
    write_ends(model, end_ids(tokenizer))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and config.max_length > positions:
        log.warning("max_length: %d is more than the %d positions of the model", config.max_length, positions)
    make_trainable(model, config, config.model_name_or_path)
    return model


def make_trainable(model: PreTrainedModel, config: TrainConfig, base: str) -> None:
    """Prepares a model loaded from `base` for training as `config` says: adapter, checkpointing, router loss.

    Raises ValueError if that is impossible for this model, or if recomputing layers changes the gradients.
    """
    if config.activation_offloading:
        check_offloading(model.device)
    check_trainable(model, config.use_peft)
    if config.use_peft:
        add_adapter(model, config, base)
    if config.activation_checkpointing:
        target = HOST if config.activation_offloading else None
        check_checkpointing(model, lambda: enable_activation_checkpointing(model, offload_to=target))
    set_router_loss(model, config.router_aux_loss_coef)  # after the probe, whose passes belong to no step


def load_policy(
    source: str,
    *,
    field: str = "model_name_or_path",
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    layers: LayerOptions = PLAIN,
) -> PreTrainedModel:
    """Loads the causal LM in a folder or under a hub name, and checks that it runs on packs.

    Raises ValueError, naming `field`, if there is no such model, if weights are missing (a reward model has no
    language-model head), or if it cannot run on packs with the options `layers`.
    """
    config = read_model_config(source, field, trust_remote_code)
    model, missing = _open(AutoModelForCausalLM, source, field, config, device, dtype, load_in_4bit, trust_remote_code)
    _check_complete(source, field, missing)
    if type(model.config) is not type(config):
        log.warning(
            "%s: only the language model of %s is loaded, trained and saved (model_type %s in place of %s)",
            *(field, source, model.config.model_type, config.model_type),
        )
    return _ready(model, device, layers)


def build_policy(
    settings: Mapping[str, Any] | PretrainedConfig,
    *,
    vocab_size: int,
    eos_token_id: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    layers: LayerOptions = PLAIN,
) -> PreTrainedModel:
    """Builds a causal LM from scratch. `settings`: a transformers configuration, or its fields with `model_type`.

    The weights depend only on `seed`. Raises ValueError for an unknown `model_type`.
    """
    config = copy.deepcopy(settings) if isinstance(settings, PretrainedConfig) else _build_config(settings)
    ids = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "bos_token_id": None, "pad_token_id": None}
    for part in (config, config.get_text_config()):
        for name, value in ids.items():
            with suppress(StrictDataclassFieldValidationError):  # some model types do not accept None as an id
                setattr(part, name, value)
    try:
        with _seeded(seed, torch.device(device)):
            model = AutoModelForCausalLM.from_config(silent_config(config), dtype=DTYPES[dtype])
    except Exception as error:  # the code of a model family may raise any exception
        if isinstance(error, torch.OutOfMemoryError):
            raise
        kind = config.model_type
        raise ValueError(f"model_config: a model of type {kind} cannot be built ({one_line(error)})") from error
    return _ready(model, device, layers)


def _build_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Builds the transformers configuration with these fields. Raises ValueError for an unknown `model_type` or
    field."""
    fields = dict(settings)
    try:
        config = AutoConfig.for_model(fields.pop("model_type", ""), **fields)
    except Exception as error:  # for example because of inconsistent sizes
        if type(error) is ValueError:
            raise ValueError(f"model_config.model_type: {settings.get('model_type')!r} is not known") from error
        raise ValueError(f"model_config: {one_line(error)}") from error
    known = {field.name for field in dataclasses.fields(config)}
    for name in fields:
        # A name that resembles no known field may be an older name, which transformers still accepts.
        if name not in known and (guess := nearest(name, known)):
            raise ValueError(f"model_config: {settings['model_type']} has no {name!r}{guess}")
    return config


def load_reward_model(
    source: str,
    *,
    pad_token_id: int | None,
    seed: int = 0,
    field: str = "reward_model_path",
    must_be_trained: bool = False,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    layers: LayerOptions = PLAIN,
) -> PreTrainedModel:
    """Loads a sequence classifier with one score: a saved reward model, or the backbone of a causal LM with a new head.

    A new head starts at N(0, 1/sqrt(D + 1)), drawn with `seed` (Stiennon et al. 2020, arXiv 2009.01325). Every head
    runs in float32; on loading, a saved head is rounded to `dtype`. `pad_token_id` is only written into the
    configuration, for plain `AutoModelForSequenceClassification`; it must be None if padding and EOS are the same
    token. Raises ValueError, naming `field`, if there is no such model, if weights are missing, if its head is not one
    linear map, or if `must_be_trained` is true and the head is new.
    """
    config = read_model_config(source, field, trust_remote_code)
    config.num_labels = 1
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    kind = scorer_class(config)
    model, missing = _open(kind, source, field, config, device, dtype, load_in_4bit, trust_remote_code)
    head = float_score_head(model, source, field)
    _check_complete(source, field, set(missing) - {"score.weight"})
    if missing:
        if shape := missing["score.weight"]:
            raise ValueError(
                f"{field}: {source!r} has a trained head with {shape[0]} labels, but a reward model has one; give a "
                "model without a head, or with a head of one label"
            )
        if must_be_trained:
            raise ValueError(f"{field}: {source!r} has no trained score head; train one with `fastrlhf reward`")
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5, generator=generator)
    return _ready(model, device, layers)


def float_score_head(model: PreTrainedModel, source: str, field: str) -> Linear:
    """Makes the head of a sequence classifier run in float32. Raises ValueError if it is not one linear map."""
    head = getattr(model, "score", None)
    if not isinstance(head, Linear) or head.out_features != 1 or head.bias is not None:
        raise ValueError(f"{field}: {type(model).__name__} of {source!r} has no `score` head that is one linear map")
    # The score is then computed in float32 both by the packed forward pass and by the model's own.
    head.float().register_forward_pre_hook(_float_input)
    head.weight.data = head.weight.data.clone()  # the alignment in a mapped file changes last bits
    return head


def vocabulary(model: PreTrainedModel) -> int:
    """Returns the number of rows of the embedding, from the configuration."""
    return model.config.get_text_config().vocab_size


def check_vocabulary(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, naming the field, if the embedding of a model has no row for an id of the tokenizer. More rows
    are accepted, because embeddings are often padded, and models of one family may be padded to different numbers of
    rows."""
    for field, model in models.items():
        check_size(field, vocabulary(model), tokenizer)


def check_size(field: str, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    needed = num_token_ids(tokenizer)
    if size < needed:
        raise ValueError(
            f"{field}: its vocabulary of {size} is smaller than the tokenizer's {needed}; "
            "give the model and the tokenizer that belong together"
        )


def read_model_config(source: str, field: str, trust_remote_code: bool) -> PretrainedConfig:
    """Reads the configuration of a model and sets its noise settings, such as dropout, to 0. Raises ValueError, naming
    `field`, if there is no model."""
    if is_missing_folder(source):
        raise ValueError(f"{field}: {source!r} is neither a local folder nor a valid name of a hub model")
    check_hub(source, f"{field}: {source!r}")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations raise exceptions of any type for invalid values
        if (Path(source) / "adapter_config.json").exists():
            whole = "give the folder of its run, which holds the whole model"
            raise ValueError(f"{field}: {source!r} holds only an adapter; {whole}") from error
        if Path(source).is_dir():
            raise ValueError(
                f"{field}: {source!r} holds no model that transformers can load ({one_line(error)})"
            ) from error
        raise ValueError(f"{field}: {source!r} is neither a local folder nor an accessible hub model") from error
    check_decoder(config, f"{field}: {source!r}")
    stored_in_four_bit(config, source, field)
    return silent_config(config)


def check_architecture(config: TrainConfig) -> None:
    """Raises ValueError, naming the key, if the starting model is not a causal LM."""
    if config.model_config:
        model = _build_config(parse_model_config(config.model_config))
        check_decoder(model, f"model_config.model_type: {model.model_type!r}")
    elif config.model_name_or_path:
        read_model_config(config.model_name_or_path, "model_name_or_path", config.trust_remote_code)


def _open(
    kind: Any,
    source: str,
    field: str,
    config: PretrainedConfig,
    device: torch.device | str,
    dtype: str,
    load_in_4bit: bool,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, tuple[int, ...]]]:
    """Loads a model of the class `kind`. Also returns, for every weight that the checkpoint does not provide, name ->
    its shape in the checkpoint, which differs from the model's; () if it is missing there."""
    warn_if_rounded(source, dtype, field)
    settings: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if stored_in_four_bit(config, source, field):
        settings |= {"device_map": {"": device}}
    elif load_in_4bit:  # quantised on the final device
        settings |= {"quantization_config": quantization(DTYPES[dtype]), "device_map": {"": device}}
    opened: Any = kind
    try:
        if is_sharded(stem := Path(source) / "model"):  # a checkpoint written by several processes
            with torch.device("meta"):
                if not issubclass(kind, PreTrainedModel):
                    opened = type(kind.from_config(config, trust_remote_code=trust_remote_code))
            settings |= {"pretrained_model_name_or_path": None, "state_dict": read_tensors(stem)}
        with quiet(), nullcontext() if "device_map" in settings else loading_parts(device):
            loaded = opened.from_pretrained(
                config=config,
                dtype=DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
    except Exception as error:  # the code of a model family, or a damaged file, may raise exceptions of any type
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{field}: the weights of {source!r} cannot be loaded: {one_line(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    mismatched = {name: tuple(there) for name, there, _ in info["mismatched_keys"]}
    return model, dict.fromkeys(info["missing_keys"], ()) | mismatched


def _check_complete(source: str, field: str, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"{field}: {source!r} lacks the weights {', '.join(sorted(missing))}")


def _float_input(module: Module, arguments: tuple[Tensor]) -> Tensor:
    return arguments[0].float()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch's random draws depend only on `seed`; afterwards the generators are restored."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _ready(model: PreTrainedModel, device: torch.device | str, layers: LayerOptions) -> PreTrainedModel:
    silence(model)
    model.to(device)  # pyright: ignore[reportArgumentType] (transformers' wrapper hides that it is a method)
    model.eval()
    keep_layout(model)
    attention = prepare_layers(model, layers)
    log.info(
        "%s: %.3g parameters in %s on %s, attention by %s%s%s",
        *(type(model).__name__, model.num_parameters(), model.dtype, model.device, attention),
        ", Liger's kernels" if layers.use_liger_kernel else "",
        ", compiled layers" if layers.torch_compile else "",
    )
    return model
