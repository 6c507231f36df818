"""Provides log-probs of a frozen reference: computed once, read from the disk, or computed by a copy of the model at
every step.

All three give the same numbers up to the rounding of different packs. By default they are computed once, which takes
one pass over the data and needs no second model during training. The pass is saved as it goes (saved_logprobs.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from fastrlhf.algorithms.saved_logprobs import SavedLogprobs
from fastrlhf.algorithms.scoring import Tree, Trees, num_responses, per_response, sequence_logprobs
from fastrlhf.config import ReferenceConfig
from fastrlhf.data.identity import require_same_tokenizer
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import check_size, load_policy, read_model_config
from fastrlhf.models.sharding import full, shard
from fastrlhf.runtime.atomic import PASSES
from fastrlhf.types import PackedBatch

log = logging.getLogger(__name__)

Reference = Callable[[PackedBatch, Sequence[int]], Tensor]
"""(pack, indices of its trees) -> log pi_ref of its sequences [N] float32, in nats, without gradient."""


@dataclass(frozen=True, slots=True)
class LiveReference:
    """A reference whose model computes the log-probs of a pack when they are needed."""

    model: PreTrainedModel

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, indices: Sequence[int]) -> Tensor:
        return sequence_logprobs(self.model, batch)


def live_models(reference: object) -> list[PreTrainedModel]:
    """Returns the model of a reference that makes passes during the run; empty for precomputed log-probs."""
    return [reference.model] if isinstance(reference, LiveReference) else []


def check_reference(config: ReferenceConfig, tokenizer: PreTrainedTokenizerBase, *, conversations: bool) -> None:
    """Raises ValueError, before any model is loaded, if the tokenizer of `ref_model_name_or_path` differs from that of
    the run, or if the reference has no embedding for one of the run's ids."""
    field, source = "ref_model_name_or_path", config.ref_model_name_or_path
    if not source:
        return
    require_same_tokenizer(field, source, tokenizer, config, conversations=conversations)
    size = read_model_config(source, field, config.trust_remote_code).get_text_config().vocab_size
    check_size(field, size, tokenizer)


def open_reference(
    config: ReferenceConfig, policy: PreTrainedModel, trees: Sequence[Tree], needed: Iterable[int]
) -> Reference:
    """Opens the reference of `config`: `ref_model_name_or_path`, or the policy as it is now.

    Log-probs are computed for the trees whose indices are `needed`; with `ref_cache_dir`, for all trees, so that other
    runs can use them. Raises ValueError if the reference gives a log-prob that is not finite, or if the folder of the
    cache cannot be made.
    """
    if not config.precompute_ref_log_probs:
        model = _open(config, policy) if config.ref_model_name_or_path else frozen_copy(policy)
        shard(model)
        return LiveReference(model)
    computed = range(len(trees)) if config.ref_cache_dir else sorted(set(needed))
    some = trees.select(computed) if isinstance(trees, Trees) else [trees[i] for i in computed]
    sums = _precomputed(config, policy, some).to(policy.device)
    per_tree = dict(zip(computed, sums.split([num_responses(trees[i]) for i in computed]), strict=True))
    return lambda batch, indices: torch.cat([per_tree[i] for i in indices])


def _precomputed(config: ReferenceConfig, policy: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Returns the log-probs of all responses, tree after tree. Those that an earlier run has saved are read."""
    saved = _open_saved(config, policy, trees)
    if saved is None:
        return torch.cat(_compute(config, policy, trees))
    known = saved.read()
    num_known, num_all = sum(map(len, known.values())), sum(map(num_responses, trees))
    if num_known == num_all:
        log.info("reference: log-probs of %d responses read from %s", num_all, saved.folder)
        return torch.cat([known[i] for i in range(len(trees))])
    if num_known:
        log.info("reference: log-probs of %d of %d responses read from %s", num_known, num_all, saved.folder)
    sums = _compute(config, policy, trees, known, saved)
    saved.complete(sums)
    return torch.cat(sums)


def _open_saved(config: ReferenceConfig, policy: PreTrainedModel, trees: Sequence[Tree]) -> SavedLogprobs | None:
    """Opens the folder of the log-probs: in `ref_cache_dir`, or else in the folder of the run, which deletes it at its
    end; None if the run has no folder."""
    if config.ref_cache_dir:
        folder, key = Path(config.ref_cache_dir), "ref_cache_dir"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{key}: {str(folder)!r} cannot be made: {error.strerror}") from error
    elif config.output_dir:  # made with the first chunk, so that a model that is refused leaves no folder
        folder, key = Path(config.output_dir) / PASSES, "output_dir"
    else:
        return None
    return SavedLogprobs(folder / _fingerprint(config, policy, trees), key)


def _compute(
    config: ReferenceConfig,
    policy: PreTrainedModel,
    trees: Sequence[Tree],
    known: Mapping[int, Tensor] | None = None,
    saved: SavedLogprobs | None = None,
) -> list[Tensor]:
    """Computes the log-probs of the responses of each tree, except those that are `known`, and saves them from time to
    time. A separate reference model is loaded, used and freed."""
    own = bool(config.ref_model_name_or_path)
    model, field = (_open(config, policy), "ref_model_name_or_path") if own else (policy, "model_name_or_path")
    budget, title = config.micro_batch_tokens, "log-probs of the reference" if config.progress else ""
    save = saved.add if saved else None
    return per_response(model, trees, budget, sequence_logprobs, field, title, known=known, save=save)


def _open(config: ReferenceConfig, policy: PreTrainedModel) -> PreTrainedModel:
    return load_policy(
        config.ref_model_name_or_path,
        field="ref_model_name_or_path",
        device=policy.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    ).requires_grad_(False)


def _fingerprint(config: ReferenceConfig, policy: PreTrainedModel, trees: Sequence[Tree]) -> str:
    """Returns a hash of everything that the log-probs depend on, except the machine: configuration, weights, dtype,
    tokens."""
    digest = hashlib.sha256(config.dtype.encode())
    if config.ref_model_name_or_path:
        _digest_files(digest, config.ref_model_name_or_path)
    else:
        settings = {name: value for name, value in policy.config.to_dict().items() if name != "_name_or_path"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in policy.state_dict(keep_vars=True).items():
            if ".lora_" in name:  # an untrained adapter changes nothing
                continue
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(full(tensor).detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    for segment in (segment for tree in trees for segment in tree):
        digest.update(
            np.array(
                [segment.parent, segment.cut, segment.num_scored, *segment.token_ids, *(segment.scored or ())], np.int64
            ).tobytes()
        )
    return digest.hexdigest()[:32]


def _digest_files(digest: hashlib._Hash, source: str) -> None:
    """Adds configuration and weights of a saved model to the hash without loading the model."""
    found = source if Path(source).is_dir() else os.path.dirname(cached_file(source, "config.json") or "")
    files = [file for file in sorted(Path(found).iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    if not any(file.suffix != ".json" for file in files):
        raise ValueError(f"ref_model_name_or_path: {source!r} has no local weights to compute a fingerprint from")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
