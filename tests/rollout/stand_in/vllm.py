"""A stand-in for vLLM 0.32 that implements the part of vLLM's interface that the engine uses, with transformers models.
The stand-in accepts only vLLM's keywords, starts from random weights and samples with one random generator per request.
Like vLLM, it seeds the global random generators of its process and sets environment variables.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch

__version__ = "0.32.0"


class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        max_tokens: int = 16,
        ignore_eos: bool = False,
        stop_token_ids: list[int] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        detokenize: bool = True,
        allowed_token_ids: list[int] | None = None,
    ):
        assert temperature >= 0.01
        assert max_tokens >= 1
        assert ignore_eos, "otherwise vLLM would also stop at the EOS of the model's folder"
        assert logprobs == 0
        assert not detokenize, "there is no tokenizer to detokenize with"
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.stop_token_ids = stop_token_ids or []
        self.allowed_token_ids = allowed_token_ids


class LLM:
    made: ClassVar[list["LLM"]] = []
    drops_its_cache: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        skip_tokenizer_init: bool,
        generation_config: str,
        logprobs_mode: str,
        weight_transfer_config: "WeightTransferConfig",
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        enable_sleep_mode: bool,
        trust_remote_code: bool,
        seed: int,
        enable_chunked_prefill: bool | None,
    ):
        assert enable_chunked_prefill is False, "on a CPU the generator of a request cannot be rewound"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert (load_format, skip_tokenizer_init, generation_config) == ("dummy", True, "vllm")
        Path(tempfile.gettempdir(), "vllm_dist_1").touch()  # vLLM removes its file only at a regular exit
        match os.environ.get("STAND_IN"):
            case "hangs":
                os.write(1, b"hangs\n")
                time.sleep(1000)
            case "exits":
                os._exit(3)
            case "fails":
                raise RuntimeError("no memory node\nis\tfree")
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed + 1000)  # so that weights differ from those of a policy made with the run's seed
        os.environ["VLLM_DIST_IDENT"] = "set"
        self.seed, self.sleeps, self.awake = seed, enable_sleep_mode, {"weights", "kv_cache"}
        self.tempered = logprobs_mode == "processed_logprobs"
        self.max_model_len = max_model_len
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.model.load_weights = self._load_weights
        kind = WeightTransferEngineFactory.registry[weight_transfer_config.backend]
        self.transfer = kind(weight_transfer_config, None, torch.device("cpu"), self.model)
        self.cache_is_stale = False
        self.updates, self.loads, self.missing = 0, 0, set()
        LLM.made.append(self)

    def init_weight_transfer_engine(self, request: dict):
        self.transfer.init_transfer_engine(self.transfer.init_info_cls(**request["init_info"]))

    def start_weight_update(self):
        assert "weights" in self.awake
        self.missing = {name for name, _ in self.model.named_parameters()}
        self.transfer.start_weight_update()

    def update_weights(self, request: dict):
        self.loads += 1
        self.transfer.update_weights(request["update_info"])

    def finish_weight_update(self):
        self.transfer.finish_weight_update()
        assert not self.missing
        self.cache_is_stale = True
        self.updates += 1

    def _load_weights(self, weights):
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)
            self.missing.remove(name)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        assert "kv_cache" in self.awake
        self.cache_is_stale = not LLM.drops_its_cache
        return LLM.drops_its_cache

    def sleep(self, level: int = 1):
        assert self.sleeps
        assert level == 2
        self.awake = set()
        for parameter in self.model.parameters():
            parameter.data.fill_(float("nan"))

    def wake_up(self, tags: list[str]):
        self.awake |= {*tags}

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not self.cache_is_stale
        assert self.awake == {"weights", "kv_cache"}
        return [
            SimpleNamespace(outputs=[self._answer(prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt, params):
        generator = torch.Generator().manual_seed(params.seed)
        tokens, logprobs = [], []
        while len(tokens) < params.max_tokens and len(prompt) + len(tokens) < self.max_model_len:
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            if params.allowed_token_ids is not None:
                hidden = torch.ones_like(logits, dtype=torch.bool)
                hidden[params.allowed_token_ids] = False
                logits = logits.masked_fill(hidden, float("-inf"))
            tempered = (logits / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            told = tempered if self.tempered else logits.log_softmax(-1)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=told[token].item())})
            if token in params.stop_token_ids:
                break
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs)


@dataclass
class WeightTransferConfig:
    backend: str = "nccl"


class WeightTransferInitInfo:
    pass


class WeightTransferUpdateInfo:
    pass


class WeightTransferEngine:
    def __init__(self, config, vllm_config, device, model):
        self.device, self.model, self.model_config = device, model, None

    def parse_update_info(self, update_dict):
        return self.update_info_cls(**update_dict)


class WeightTransferEngineFactory:
    registry: ClassVar[dict[str, type]] = {}

    @classmethod
    def register_engine(cls, name, kind):
        if name in cls.registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        cls.registry[name] = kind


def initialize_layerwise_reload(model):
    pass


def finalize_layerwise_reload(model, model_config):
    pass


def _submodule(name: str, *content) -> None:
    module = sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    for value in content:
        setattr(module, value.__name__, value)


_submodule("config", WeightTransferConfig)
_submodule("distributed.weight_transfer.base", WeightTransferInitInfo, WeightTransferUpdateInfo, WeightTransferEngine)
_submodule("distributed.weight_transfer.factory", WeightTransferEngineFactory)
_submodule("model_executor.model_loader.reload", initialize_layerwise_reload, finalize_layerwise_reload)
