"""Models by hub name, by folder, or from scratch. A model that cannot be trained correctly is refused here."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from fastrlhf.data.tokenizer import is_missing_folder, load_tokenizer
from fastrlhf.models.adapter_targets import check_new_rows
from fastrlhf.models.adapters import add_adapter, warn_if_rounded
from fastrlhf.models.architecture import check_decoder
from fastrlhf.models.forward import enable_activation_checkpointing
from fastrlhf.models.four_bit import check_trainable, keep_layout, quantization, stored_in_four_bit
from fastrlhf.models.layers import LayerOptions, prepare_layers
from fastrlhf.models.noise import silence, silent_config
from fastrlhf.models.offload import HOST, check_offloading
from fastrlhf.models.probe import check_checkpointing, one_line
from fastrlhf.models.quiet import quiet
from fastrlhf.models.reward_head import scorer_class
from fastrlhf.models.router_loss import set_router_loss
from fastrlhf.models.shards import is_sharded, read_tensors
from fastrlhf.models.vocabulary import write_ends

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLAIN = LayerOptions()


def open_policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that `model_name_or_path` or `model_config` names, on the device of the run, ready to train.

    Tokens that the tokenizer has more than the model get new embeddings, drawn with `seed`. With `use_peft` it has an
    adapter. Raises ValueError as `build_policy` and `load_policy` do, where neither or both are given, and for an
    adapter on weights that nothing has trained.
    """
    device = resolve_device(config.device)
    if config.model_config:
        if config.model_name_or_path:
            raise ValueError("model_config: give either a model or a configuration to build one from, not both")
        require(not config.use_peft, "use_peft", True, "false: a model from scratch has no weights to adapt")
        model = build_policy(
            parse_model_config(config.model_config),
            vocab_size=len(tokenizer),
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
    if vocabulary(model) < len(tokenizer):
        new = len(tokenizer) - vocabulary(model)
        if config.use_peft:
            check_new_rows(model, config.lora_modules_to_save, new)
        with _seeded(config.seed, device):
            model.resize_token_embeddings(len(tokenizer))
        log.warning(
            "tokenizer_name_or_path: %d rows added to the embedding of the model, for tokens that it has not seen", new
        )
    write_ends(model, end_ids(tokenizer))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and config.max_length > positions:
        log.warning("max_length: %d is more than the %d positions of the model", config.max_length, positions)
    make_trainable(model, config, config.model_name_or_path)
    return model


def make_trainable(model: PreTrainedModel, config: TrainConfig, base: str) -> None:
    """Applies the settings of `config` to a model to train, loaded from `base`: adapter, activation checkpointing.

    Raises ValueError if activations cannot be offloaded, if 4-bit weights themselves would be trained, or if layers
    that are computed again give other gradients.
    """
    if config.activation_offloading:
        check_offloading(model.device)
    check_trainable(model, config.use_peft)
    if config.use_peft:
        add_adapter(model, config, base)
    if config.activation_checkpointing:
        target = HOST if config.activation_offloading else None
        check_checkpointing(model, lambda: enable_activation_checkpointing(model, offload_to=target))
    set_router_loss(model, config.router_aux_loss_coef)  # after the probe, whose passes are not part of a step


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
    """The causal LM in a folder or under a hub name, checked to run on packs.

    Raises ValueError, naming `field`, where there is no such model, where weights are missing (a reward model has no
    language-model head), or where it cannot be packed as `layers` asks.
    """
    config = read_model_config(source, field, trust_remote_code)
    model, missing = _open(AutoModelForCausalLM, source, field, config, device, dtype, load_in_4bit, trust_remote_code)
    _check_complete(source, field, missing)
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
    """A causal LM from scratch. `settings` is a transformers configuration, or its fields with `model_type` among them.

    The weights depend on `seed` alone. Raises ValueError for an unknown `model_type`.
    """
    config = copy.deepcopy(settings) if isinstance(settings, PretrainedConfig) else _build_config(settings)
    ids = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "bos_token_id": None, "pad_token_id": None}
    for part in (config, config.get_text_config()):
        for name, value in ids.items():
            with suppress(StrictDataclassFieldValidationError):  # of a model type that requires one
                setattr(part, name, value)
    try:
        with _seeded(seed, torch.device(device)):
            model = AutoModelForCausalLM.from_config(silent_config(config), dtype=DTYPES[dtype])
    except Exception as error:  # a family's own code may raise any exception
        if isinstance(error, torch.OutOfMemoryError):
            raise
        kind = config.model_type
        raise ValueError(f"model_config: a model of type {kind} cannot be built ({one_line(error)})") from error
    return _ready(model, device, layers)


def _build_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration of these fields. Raises ValueError for an unknown `model_type` or field."""
    fields = dict(settings)
    try:
        config = AutoConfig.for_model(fields.pop("model_type", ""), **fields)
    except Exception as error:  # sizes that do not go together, or anything else that a configuration raises
        if type(error) is ValueError:
            raise ValueError(f"model_config.model_type: {settings.get('model_type')!r} is not known") from error
        raise ValueError(f"model_config: {one_line(error)}") from error
    known = {field.name for field in dataclasses.fields(config)}
    for name in fields:
        # A name that resembles none of them may be an older one, which transformers still understands.
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
    """A sequence classifier with one score: a saved reward model, or a causal LM whose backbone gets a new head.

    A new head starts at N(0, 1/sqrt(D + 1)), drawn with `seed` (Stiennon et al. 2020, arXiv 2009.01325). It runs and is
    trained in float32 whatever the backbone's `dtype`; loading rounds a saved one to `dtype`. `pad_token_id` is only
    written into the configuration, where the plain `AutoModelForSequenceClassification` of other programs looks for the
    last token that is not padding; None where padding is EOS, so that it cannot mistake the one for the other. Raises
    ValueError, naming `field`, where there is no such model, where weights of its backbone are missing, where its head
    is not one linear map, or where `must_be_trained` and the head is new.
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
                f"{field}: {source!r} has a trained head with {shape[0]} labels, and a reward model has one; give a "
                "model without a head, or one whose head has one label"
            )
        if must_be_trained:
            raise ValueError(f"{field}: {source!r} has no trained score head; train one with `fastrlhf reward`")
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5, generator=generator)
    return _ready(model, device, layers)


def float_score_head(model: PreTrainedModel, source: str, field: str) -> Linear:
    """The head of a sequence classifier, made to run in float32. Raises ValueError where it is not one linear map."""
    head = getattr(model, "score", None)
    if not isinstance(head, Linear) or head.out_features != 1 or head.bias is not None:
        raise ValueError(f"{field}: {type(model).__name__} of {source!r} has no `score` head that is one linear map")
    # Both our own forward and the plain model's then compute the score in float32.
    head.float().register_forward_pre_hook(_float_input)
    head.weight.data = head.weight.data.clone()  # the alignment in a mapped file would change the last bits of a score
    return head


def vocabulary(model: PreTrainedModel) -> int:
    """Number of rows of the embedding, from the configuration."""
    return model.config.get_text_config().vocab_size


def check_same_vocabulary(models: Mapping[str, PreTrainedModel], num_tokens: int) -> None:
    """Raises ValueError where a model's embedding is smaller than the tokenizer, or where two models disagree."""
    sizes = {field: vocabulary(model) for field, model in models.items()}
    for field, size in sizes.items():
        if size < num_tokens:
            raise ValueError(
                f"{field}: its vocabulary of {size} is smaller than the tokenizer's {num_tokens}; "
                "they do not belong together"
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(f"vocabulary mismatch: {sizes}; policy, reference and reward model must share one tokenizer")


def check_same_tokenizer(
    field: str, source: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, *, required: bool
) -> None:
    """Raises ValueError where the tokenizer saved beside a model gives other ids, or another EOS, than that of the run;
    and where there is none to compare but one is required."""
    try:
        other = load_tokenizer(source, eos_token=config.eos_token or None, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        if not required:
            return
        raise ValueError(f"{field}: {error}; save the tokenizer of its training beside it") from error
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ValueError(
            f"{field}: {source!r} has another tokenizer than the run ({token!r} is id {theirs.get(token)} there and "
            f"{ours.get(token)} here); both must read the same ids"
        )
    if other.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"{field}: responses end in {other.eos_token!r} there and in {tokenizer.eos_token!r} here; set eos_token"
        )


def read_model_config(source: str, field: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a model, without dropout and other noise. Raises ValueError, naming `field`, if there is
    none."""
    if is_missing_folder(source):
        raise ValueError(f"{field}: {source!r} is neither a folder here nor a name that a model of the hub can have")
    check_hub(source, f"{field}: {source!r}")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever kind a configuration raises for values that do not fit
        if (Path(source) / "adapter_config.json").exists():
            whole = "give the folder of its run, which holds the whole model"
            raise ValueError(f"{field}: {source!r} holds only an adapter; {whole}") from error
        if Path(source).is_dir():
            raise ValueError(
                f"{field}: {source!r} holds no model that transformers knows ({one_line(error)})"
            ) from error
        raise ValueError(f"{field}: {source!r} is neither a folder here nor a model the hub gives us") from error
    check_decoder(config, f"{field}: {source!r}")
    stored_in_four_bit(config, source, field)
    return silent_config(config)


def check_architecture(config: TrainConfig) -> None:
    """Raises ValueError, naming the key, where the configuration of the starting model is not that of a causal LM."""
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
    """The model, of an auto class or of a specific class, and the weights that the checkpoint lacks or has in another
    shape: name -> shape in the checkpoint, empty if it is missing there."""
    warn_if_rounded(source, dtype, field)
    settings: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if stored_in_four_bit(config, source, field):
        settings |= {"device_map": {"": device}}
    elif load_in_4bit:  # quantised on the final device
        settings |= {"quantization_config": quantization(DTYPES[dtype]), "device_map": {"": device}}
    opened: Any = kind
    try:
        if is_sharded(stem := Path(source) / "model"):  # the checkpoint of several processes
            with torch.device("meta"):
                if not issubclass(kind, PreTrainedModel):
                    opened = type(kind.from_config(config, trust_remote_code=trust_remote_code))
            settings |= {"pretrained_model_name_or_path": None, "state_dict": read_tensors(stem)}
        with quiet():
            loaded = opened.from_pretrained(
                config=config,
                dtype=DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
    except Exception as error:  # of whatever kind a family's own code, or a file, raises
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{field}: the weights of {source!r} cannot be loaded: {one_line(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    mismatched = {name: tuple(there) for name, there, _ in info["mismatched_keys"]}
    return model, dict.fromkeys(info["missing_keys"], ()) | mismatched


def _check_complete(source: str, field: str, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"{field}: {source!r} lacks weights of such a model: {', '.join(sorted(missing))}")


def _float_input(module: Module, arguments: tuple[Tensor]) -> Tensor:
    return arguments[0].float()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch's draws on the CPU and on `device` depend only on `seed`; afterwards the generators are
    restored."""
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


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first CUDA GPU, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} asked for, but torch sees no CUDA GPU; use auto or cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is not a device; give auto, cpu or cuda") from error
    if found.index is not None and found.type == "cuda":
        torch.cuda.set_device(found)  # kernels and graphs run on the current device
    return found
