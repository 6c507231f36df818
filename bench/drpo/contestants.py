"""Who is measured: ours, the padded reference, and TRL's PPO. Each is built once and then asked for an update."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from bench.drpo import padded
from bench.drpo.problem import EOS, RESPONSE_LENGTH, Models, Problem
from bench.measure import now
from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.on_policy import draw_prefixes, make_engine, update
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.optim import Optimizer
from fastrlhf.types import TokenizedExample

PHASES = ("rollout", "scoring", "training")
Row = dict[str, Any]


class Contestant(Protocol):
    name: str
    state_bytes: int
    """Of gradients and optimiser state, once an update has made them."""

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        """One update; seconds by phase, tokens sampled, and tokens of one pass over the sequences, padding included."""
        ...


class Clock:
    """Seconds by phase, as `measure.now` counts them."""

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
        self.policy, self.critic = models.policy, models.critic
        self.reference = frozen_copy(self.policy)
        self.judge = reward_model_judge(
            frozen_copy(self.critic), eos_token_id=EOS, micro_batch_tokens=problem.micro_batch_tokens
        )
        self.optimizer = _optimizer(problem, models)
        self.state_bytes = _state_bytes(models)

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
        }


class Padded:
    name = "padded reference"

    def __init__(self, problem: Problem, models: Models) -> None:
        self.config, self.micro_batch = problem.config(), problem.micro_batch
        self.policy, self.critic = models.policy, models.critic
        self.reference, self.reward_model = frozen_copy(self.policy), frozen_copy(self.critic)
        self.optimizer = _optimizer(problem, models)
        self.state_bytes = _state_bytes(models)

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
        }


class TRL:
    """TRL 1.12's PPO from the prompts: it has no resets. Its trainer is driven by its own `train`."""

    def __init__(self, problem: Problem, models: Models) -> None:
        import trl  # pyright: ignore[reportMissingImports]

        self.name = f"TRL {trl.__version__} PPO"
        self.problem, self.models = problem, models
        self.reference, self.reward_model = frozen_copy(models.policy), frozen_copy(models.critic)
        # Gradients and two moments, all in the dtype of the weights.
        self.state_bytes = 3 * sum(p.nbytes for model in (models.policy, models.critic) for p in model.parameters())

    def update(self, examples: Sequence[TokenizedExample], epochs: int) -> Row:
        from datasets import Dataset
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

        settings, size = self.problem.config(), self.problem.micro_batch
        policy, critic = self.models.policy, self.models.critic
        clock = Clock(policy.device)
        generate, marks, shape = ppo_trainer.batch_generation, [], []

        def timed_generation(model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
            marks.append(clock.now())
            sequences, logits = generate(model, queries, *arguments)
            marks.append(clock.now())
            shape.extend([sequences.shape, sequences.shape[1] - queries.shape[1]])
            return sequences, logits

        def first_forward(*_: Any) -> None:
            if len(marks) == 2:  # the wrapper of policy and critic runs in training alone
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
                    missing_eos_penalty=1.0, whiten_rewards=len(examples) >= 8,  # TRL refuses fewer
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
        (rows, width), length = shape
        seconds = [after - before for before, after in pairwise(marks)]
        return {
            **dict(zip(PHASES, seconds, strict=True)),
            "sampled_tokens": rows * length,
            "sequence_tokens": rows * width,
        }


def _optimizer(problem: Problem, models: Models) -> Optimizer:
    """The same one for ours and for the reference: it is not what is compared."""
    return Optimizer({"": models.policy, "value_": models.critic}, problem.config(), num_steps=1)


def _state_bytes(models: Models) -> int:
    """Gradients in the dtype of the weights, two float32 moments, and a float32 copy of bfloat16 weights."""
    params = [p for model in (models.policy, models.critic) for p in model.parameters()]
    return sum(p.nbytes + p.numel() * (8 if p.dtype == torch.float32 else 12) for p in params)


def _tokenizer(policy: PreTrainedModel) -> PreTrainedTokenizerFast:
    """Two ids are all that TRL asks of it: the EOS, and as padding one that no text holds."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    padding = policy.config.vocab_size - 1
    policy.generation_config.pad_token_id = padding  # pyright: ignore[reportOptionalMemberAccess]
    base = Tokenizer(WordLevel({"<eos>": EOS, "<pad>": padding}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<eos>", pad_token="<pad>", unk_token="<eos>", padding_side="left"
    )


CONTESTANTS = {"ours": Ours, "padded": Padded, "trl": TRL}
