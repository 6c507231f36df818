"""Provides log-probs of a frozen reference: computed once, cached on disk, or computed by a copy of the model at every
step.

All three give the same numbers up to the rounding of different packs. By default they are computed once, which takes
one pass over the data and needs no second model during training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from fastrlhf.algorithms.scoring import Tree, Trees, num_responses, per_response, sequence_logprobs
from fastrlhf.config import ReferenceConfig
from fastrlhf.data.identity import require_same_tokenizer
from fastrlhf.distributed.ranks import from_all, on_first, together
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import check_size, load_policy, read_model_config
from fastrlhf.models.sharding import full, shard
from fastrlhf.runtime.atomic import current_umask, flush
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
    runs can use them. Raises ValueError if the reference gives a log-prob that is not finite, or if the cache cannot be
    used.
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
    """Returns the log-probs of all responses, tree after tree, from the cache if it has them."""
    if not config.ref_cache_dir:
        return _compute(config, policy, trees)
    folder = Path(config.ref_cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"ref_cache_dir: {config.ref_cache_dir!r} cannot be made: {error.strerror}") from error
    file = folder / f"{_fingerprint(config, policy, trees)}.safetensors"
    if all(from_all(file.exists())):
        sums = together(lambda: _read(file, sum(map(num_responses, trees))))
        log.info("reference: log-probs of %d responses read from %s", len(sums), file)
        return sums
    sums = _compute(config, policy, trees)
    on_first(lambda: _keep(sums, file))
    return sums


def _keep(sums: Tensor, file: Path) -> None:
    """Writes log-probs to the cache. If they cannot be written, for example to a full disk, a warning is logged and the
    run continues without the cache."""
    partial = file.with_suffix(f".{os.getpid()}.partial")  # two runs may write the same file
    sums = sums.cpu()
    try:
        save_file({"logprobs": sums}, partial, {"sha256": _hash(sums)})
        partial.chmod(0o666 & ~current_umask())
        flush(partial)
        os.replace(partial, file)
        flush(file.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        log.warning("ref_cache_dir: %s cannot be written, the run continues without it: %s", file, error)
        return
    log.info("reference: log-probs of %d responses kept in %s", len(sums), file)


def _read(file: Path, num: int) -> Tensor:
    """Reads the log-probs of `num` responses from a cache file. Raises ValueError if the file has changed since it was
    written."""
    try:
        with safe_open(file, "pt") as content:
            sums, kept = content.get_tensor("logprobs"), (content.metadata() or {}).get("sha256")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"ref_cache_dir: {str(file)!r} is damaged; delete it ({error})") from error
    if kept is None:
        raise ValueError(f"ref_cache_dir: {str(file)!r} has no hash, because an older version wrote it; delete it")
    if kept != _hash(sums) or sums.shape != (num,):
        raise ValueError(f"ref_cache_dir: {str(file)!r} is damaged; delete it (its hash or its size differs)")
    return sums


def _hash(sums: Tensor) -> str:
    return hashlib.sha256(sums.numpy().tobytes()).hexdigest()


def _compute(config: ReferenceConfig, policy: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Computes the log-probs of all responses, tree after tree. A separate reference model is loaded, used and
    freed."""
    own = bool(config.ref_model_name_or_path)
    model, field = (_open(config, policy), "ref_model_name_or_path") if own else (policy, "model_name_or_path")
    budget, title = config.micro_batch_tokens, "log-probs of the reference" if config.progress else ""
    return torch.cat(per_response(model, trees, budget, sequence_logprobs, field, title))


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
