"""The program of a vLLM process, which rollout/vllm_child.py starts and sends requests to.

It answers one request after another until the trainer closes the connection, and ends when the trainer ends. Only this
process imports vLLM: the library rewrites classes of transformers, seeds the global generators, starts
torch.distributed and sets environment variables.

How vLLM is used:
    weights     vLLM's weight-transfer interface, with a backend registered here. The engine starts with random weights
    log-probs   logprobs_mode "processed_logprobs": under the distribution that was sampled, at its temperature
    ids         prompts and responses are token ids; vLLM reads no tokenizer and no generation_config.json
    on a CPU    vLLM keeps a copy of each weight in another layout, which must be rebuilt after every update
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn import Module

from fastrlhf.rollout.vllm_memory import Entry, SharedMemory

OLDEST = (0, 32)
"""Oldest version of vLLM that has the functions used here."""
BACKEND = "fastrlhf"
"""The name under which the weight-transfer backend is registered."""

Sampled = tuple[list[int], list[float]]
"""(token ids of a response, log-prob of each token in nats)"""


class Worker:
    """A vLLM engine that serves the trainer. Every public method is a request that the trainer may send."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._llm: Any = None
        self._vllm: Any = None
        self._sleeps = False

    def open(self, settings: dict[str, Any]) -> str:
        """Makes the engine with random weights; `settings` are keywords of `vllm.LLM`. Returns the version of vLLM."""
        self._vllm = importlib.import_module("vllm")
        version = str(self._vllm.__version__)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
            raise ImportError(f"version {version} is older than {'.'.join(map(str, OLDEST))}")
        _register_backend()
        self._sleeps = settings.get("enable_sleep_mode", False)
        self._llm = self._vllm.LLM(
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            weight_transfer_config=importlib.import_module("vllm.config").WeightTransferConfig(backend=BACKEND),
            **settings,
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.sleep()
        return version

    def start_update(self) -> None:
        """Begins an update of all weights."""
        if self._sleeps:
            self._llm.wake_up(["weights"])
        self._llm.start_weight_update()

    def load(self, entries: Sequence[Entry]) -> None:
        """Loads the weights that the trainer has written into the memory."""
        self._llm.update_weights({"update_info": {"memory": self._memory, "entries": entries}})

    def finish_update(self) -> None:
        """Ends an update. Raises ValueError if vLLM did not drop the keys and values of the previous weights."""
        self._llm.finish_weight_update()
        if self._sleeps:
            self._llm.wake_up(["kv_cache"])
        if self._llm.reset_prefix_cache() is not True:
            raise ValueError(
                "did not drop its cached keys and values (reset_prefix_cache), so it would sample with those of the "
                "previous weights; set engine to transformers"
            )

    def generate(
        self,
        prompts: Sequence[list[int]],
        budgets: Sequence[int],
        seeds: Sequence[int],
        temperatures: Sequence[float],
        sampling: dict[str, Any],
    ) -> list[Sampled]:
        """Returns one response per prompt, in order. `budgets` are the maximum numbers of tokens, `seeds` the random
        seeds and `temperatures` the sampling temperatures, one per prompt; `sampling` are keywords of
        `vllm.SamplingParams` for all prompts."""
        params = [
            self._vllm.SamplingParams(
                max_tokens=budget,
                seed=seed,
                temperature=temperature,
                # Only the trainer's end tokens count (stop_token_ids), not the EOS in the model's configuration.
                ignore_eos=True,
                logprobs=0,  # log-probs of the sampled token only
                detokenize=False,
                **sampling,
            )
            for budget, seed, temperature in zip(budgets, seeds, temperatures, strict=True)
        ]
        answers = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [_sampled(answer.outputs[0]) for answer in answers]

    def sleep(self) -> None:
        """With `enable_sleep_mode`, frees the GPU memory of weights and cache until the next update."""
        if self._sleeps:
            self._llm.sleep(level=2)


def serve(connection: Connection, worker: Worker) -> None:
    """Serves requests until the trainer closes the connection. A request is (name, arguments), and an answer is (True,
    result) or (False, error, traceback)."""
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, getattr(worker, name)(*arguments))
        except Exception as error:
            answer = (False, _sendable(error), traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return


def main(socket: int, memory: int, trainer: int, folder: str) -> None:
    """Serves the trainer, with `folder`, the temporary folder of this process, as the current folder. `socket` and
    `memory` are the file descriptors of the connection and of the shared memory, `trainer` is the trainer's process
    id."""
    # Stop signals are ignored: the trainer finishes its step first and needs this process until then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(trainer, folder), daemon=True).start()
    live_in(folder)
    serve(Connection(socket), Worker(SharedMemory(memory)))
    _end(folder, 0)


def live_in(folder: str) -> None:
    """Makes `folder` the current and the temporary folder of this process. The C++ headers that torch compiles for
    generated code, which takes about 10 s, stay in the previous temporary folder and are reused by later runs."""
    compiled = default_cache_dir()
    os.makedirs(compiled, exist_ok=True)
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.symlink(compiled, default_cache_dir())


def _end_with(trainer: int, folder: str) -> None:
    """Exits this process within a second after the trainer has ended, even if the trainer was killed."""
    while os.getppid() == trainer:
        time.sleep(0.5)
    _end(folder, 1)


def _end(folder: str, code: int) -> NoReturn:
    """Removes the temporary folder and exits at once: vLLM's own shutdown takes longer than the trainer waits."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _sendable(error: Exception) -> Exception:
    """Converts an error to a built-in class with the same text, because the trainer may not be able to import the
    original class: MemoryError, ImportError or, for all others, ValueError."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return MemoryError(text)
    return ImportError(text) if isinstance(error, ImportError) else ValueError(text)


def _sampled(output: Any) -> Sampled:
    tokens = list(output.token_ids)
    return tokens, [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]


def _register_backend() -> None:
    """Registers a weight-transfer backend that reads weights from the memory shared with the trainer."""
    base: Any = importlib.import_module("vllm.distributed.weight_transfer.base")
    factory: Any = importlib.import_module("vllm.distributed.weight_transfer.factory")
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")

    @dataclass
    class InitInfo(base.WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):
        memory: SharedMemory
        entries: Sequence[Entry]

    class Backend(base.WeightTransferEngine):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def start_weight_update(self) -> None:
            if self.device.type == "cpu":
                forget_packed_experts(self.model)
            reload.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Any) -> None:
            # `read` returns copies, because vLLM keeps the tensors until all weights of a layer have arrived.
            self.model.load_weights(update_info.memory.read(update_info.entries, self.device))

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                pack_tied_heads(self.model)

        def shutdown(self) -> None:
            pass

    factory.WeightTransferEngineFactory.register_engine(BACKEND, Backend)


def forget_packed_experts(model: Module) -> None:
    """Makes vLLM rebuild its layout of mixture-of-experts weights at the next update. On a CPU it builds the layout
    only once and would read later weights in the wrong layout."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def pack_tied_heads(model: Module) -> None:
    """Rebuilds the layout of weights that two layers share. On a CPU vLLM does so only for the layer into which a
    weight was loaded, so that a head tied to the embedding would keep its random initial weights."""
    seen: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not hasattr(module, "cpu_linear") or not weight.numel():
            continue
        if id(weight) in seen:
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        seen.add(id(weight))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
