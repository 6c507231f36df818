"""The compared implementations: ours, the padded reference, and TRL's PPO. Each is built once and then runs updates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from bench.drpo import padded
from bench.drpo.problem import EOS, RESPONSE_LENGTH, Models, Problem
from bench.measure import now
from bench.mfu import training_operations
from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.algorithms.update import update
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import TokenizedExample

PHASES = ("rollout", "scoring", "training")
Row = dict[str, Any]


class Contestant(Protocol):
    name: str

    @property
    def state_bytes(self) -> int:
        """Bytes of the gradients and optimiser moments, which remain after an update."""
        ...

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        """Runs one update; returns seconds by phase, token counts and `training_work`.

        The counts are the sampled tokens, and the tokens of one pass over the sequences, padding included.
        """
        ...


class Clock:
    """Adds up the seconds of each phase of an update, measured by `measure.now`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def now(self) -> float:
        return now(self.device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[phase] += self.now() - start


class Ours:
    name = "ours"

    def __init__(self, problem: Problem, models: Models) -> None:
        self.config = problem.config()
        self.models, self.policy, self.critic = models, models.policy, models.critic
        self.reference = frozen_copy(self.policy)
        self.judge = reward_model_judge(
            frozen_copy(self.critic), eos_token_id=EOS, micro_batch_tokens=problem.micro_batch_tokens
        )
        self.optimizer = _optimizer(problem, models)

    @property
    def state_bytes(self) -> int:
        return _state_bytes(self.models, self.optimizer)

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        config, clock = replace(self.config, num_ppo_epochs=epochs), Clock(self.policy.device)
        with clock("rollout"):
            prefixes = draw_prefixes(config, examples, first_group=0)
            rollouts = make_engine(config, self.policy, EOS).generate(prefixes)
        with clock("scoring"):
            scores = torch.as_tensor(self.judge(rollouts))
            packs = pack_episodes(config, rollouts, range(len(rollouts)), self.policy.device)
            experience, _ = score_episodes(
                config, self.policy, self.reference, self.critic, rollouts, scores, packs, EOS
            )
        with clock("training"):
            update(config, self.policy, self.critic, self.optimizer, rollouts, experience, packs, seed=(0, 0))
        return {
            **clock.seconds,
            "sampled_tokens": sum(len(rollout.completion) for rollout in rollouts),
            "sequence_tokens": sum(len(r.prefix.token_ids) + len(r.completion) for r in rollouts),
            **training_work(self.models, [(len(r.prefix.token_ids), len(r.completion)) for r in rollouts], epochs),
        }


class Padded:
    name = "padded reference"

    def __init__(self, problem: Problem, models: Models) -> None:
        self.config, self.micro_batch = problem.config(), problem.micro_batch
        self.models, self.policy, self.critic = models, models.policy, models.critic
        self.reference, self.reward_model = frozen_copy(self.policy), frozen_copy(self.critic)
        self.optimizer = _optimizer(problem, models)

    @property
    def state_bytes(self) -> int:
        return _state_bytes(self.models, self.optimizer)

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        config, clock = replace(self.config, num_ppo_epochs=epochs), Clock(self.policy.device)
        with clock("rollout"):
            episodes = padded.rollout(config, self.policy, draw_prefixes(config, examples, first_group=0))
        with clock("scoring"):
            experience = padded.score(
                config, self.policy, self.reference, self.critic, self.reward_model, episodes, EOS
            )
        with clock("training"):
            padded.update(config, self.policy, self.critic, self.optimizer, episodes, experience, self.micro_batch)
        return {
            **clock.seconds,
            "sampled_tokens": episodes.response.numel(),
            "sequence_tokens": episodes.tokens.numel(),
            **training_work(self.models, _lengths(episodes), epochs),
        }


class TRL:
    """TRL 1.12's PPO, run by the trainer's own `train`. TRL has no resets, so all episodes start at prompts."""

    def __init__(self, problem: Problem, models: Models) -> None:
        import trl  # pyright: ignore[reportMissingImports]

        self.name = f"TRL {trl.__version__} PPO"
        self.problem, self.models = problem, models
        self.reference, self.reward_model = frozen_copy(models.policy), frozen_copy(models.critic)

    @property
    def state_bytes(self) -> int:
        """Bytes of the gradients and the two moments, which are all in the dtype of the weights."""
        return 3 * sum(p.nbytes for model in (self.models.policy, self.models.critic) for p in model.parameters())

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        from datasets import Dataset
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

        settings, size = self.problem.config(), self.problem.micro_batch
        policy, critic = self.models.policy, self.models.critic
        clock = Clock(policy.device)
        generate, marks, generated = ppo_trainer.batch_generation, [], []

        def timed_generation(model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
            marks.append(clock.now())
            sequences, logits = generate(model, queries, *arguments)
            marks.append(clock.now())
            generated.extend([queries, sequences[:, queries.shape[1] :]])
            return sequences, logits

        def first_forward(*_: Any) -> None:
            if len(marks) == 2:  # TRL calls its wrapper of policy and critic only in the training phase
                marks.append(clock.now())

        class End(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(clock.now())

        with tempfile.TemporaryDirectory() as out:
            trainer = PPOTrainer(
                args=PPOConfig(
                    output_dir=out, report_to="none", use_cpu=policy.device.type == "cpu", bf16=False,
                    gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, num_sample_generations=0,
                    per_device_train_batch_size=size, gradient_accumulation_steps=len(examples) // size,
                    total_episodes=len(examples), num_ppo_epochs=epochs, num_mini_batches=1,
                    local_rollout_forward_batch_size=settings.rollout_batch_size, response_length=RESPONSE_LENGTH,
                    stop_token="eos", temperature=settings.temperature, kl_coef=settings.kl_coef,
                    missing_eos_penalty=1.0, whiten_rewards=len(examples) >= 8,  # TRL refuses to whiten fewer episodes
                    learning_rate=settings.learning_rate, lr_scheduler_type="constant", seed=settings.seed,
                    dataloader_pin_memory=policy.device.type == "cuda",
                ),
                processing_class=_tokenizer(policy),
                model=policy,
                ref_model=self.reference,
                reward_model=self.reward_model,
                value_model=critic,
                train_dataset=Dataset.from_list([{"input_ids": example.prompt} for example in examples]),
                eval_dataset=Dataset.from_list([{"input_ids": [1]}]),
                callbacks=[End()],
            )  # fmt: skip
            trainer.model.register_forward_pre_hook(first_forward)
            ppo_trainer.batch_generation = timed_generation
            try:
                trainer.train()
            finally:
                ppo_trainer.batch_generation = generate
        queries, responses = generated
        prompts, sampled = (queries != policy.config.vocab_size - 1).sum(1), _up_to_eos(responses).sum(1)
        seconds = [after - before for before, after in pairwise(marks)]
        return {
            **dict(zip(PHASES, seconds, strict=True)),
            "sampled_tokens": responses.numel(),
            "sequence_tokens": queries.numel() + responses.numel(),
            **training_work(self.models, list(zip(prompts.tolist(), sampled.tolist(), strict=True)), epochs),
            "optim": trainer.args.optim,
            "master_weights": "none",
        }


def training_work(models: Models, episodes: Sequence[tuple[int, int]], epochs: int) -> Row:
    """Returns the number of operations that training must compute, counted as in `bench.mfu`.

    Training needs the policy's log-probs and the critic's values of the sampled tokens up to the EOS. `episodes` holds
    (given tokens, sampled tokens) per episode.
    """
    spans = [(0, given + sampled) for given, sampled in episodes]
    rows = sum(sampled for _, sampled in episodes)
    heads = ((models.policy.config, models.policy.config.vocab_size), (models.critic.config, 1))
    return {
        "training_tokens": epochs * sum(length for _, length in spans),
        "training_operations": epochs
        * sum(training_operations(config, spans, rows=rows, outputs=outputs) for config, outputs in heads),
    }


def _lengths(episodes: padded.Episodes) -> list[tuple[int, int]]:
    """Counts for every episode (tokens of prompt and reset, sampled tokens up to the EOS)."""
    width = episodes.tokens.shape[1] - episodes.response_length
    given = episodes.seen[:, :width].sum(1) + episodes.given
    sampled = (episodes.sampled & _up_to_eos(episodes.response)).sum(1)
    return list(zip(given.tolist(), sampled.tolist(), strict=True))


def _up_to_eos(response: Tensor) -> Tensor:
    """Returns a mask of the tokens of each response up to and including the first EOS, [N, G] bool."""
    is_eos = response == EOS
    return is_eos.cumsum(1) - is_eos.long() == 0


def _optimizer(problem: Problem, models: Models) -> Optimizer:
    """Makes the optimiser of our implementation and of the padded reference; the benchmark does not compare
    optimisers."""
    return Optimizer({"": models.policy, "value_": models.critic}, problem.config(), num_steps=1)


def _state_bytes(models: Models, optimizer: Optimizer) -> int:
    """Returns the bytes of the gradients (in the dtype of the weights) and of the moments. Leaves out float32 copies of
    the weights, because they exist before the first update.
    """
    gradients = sum(p.nbytes for model in (models.policy, models.critic) for p in model.parameters())
    state = optimizer.state_dict()
    return gradients + sum(state[name].nbytes for name in state if "." in name and not name.endswith(".master"))


def _tokenizer(policy: PreTrainedModel) -> PreTrainedTokenizerFast:
    """Makes a stub tokenizer with the two ids that TRL needs: the EOS, and a padding id that no text contains."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    padding = policy.config.vocab_size - 1
    policy.generation_config.pad_token_id = padding  # pyright: ignore[reportOptionalMemberAccess]
    base = Tokenizer(WordLevel({"<eos>": EOS, "<pad>": padding}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<eos>", pad_token="<pad>", unk_token="<eos>", padding_side="left"
    )


CONTESTANTS = {"ours": Ours, "padded": Padded, "trl": TRL}
