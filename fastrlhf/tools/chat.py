"""A chat with a model in the terminal: `fastrlhf chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from fastrlhf.config import ChatConfig, check_config
from fastrlhf.data.identity import judge_tokenizer
from fastrlhf.data.reading import judge_rows
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.specials import end_ids, special_ids
from fastrlhf.data.tokens import TextRules, encode_rows
from fastrlhf.evaluation.evaluate import open_judge, open_policy
from fastrlhf.evaluation.judges import score_texts
from fastrlhf.models.loading import check_vocabulary, read_model_config
from fastrlhf.models.precision import with_dtype
from fastrlhf.models.roles import holds_adapter, open_base, policy_role
from fastrlhf.models.vocabulary import allowed_ids, limit_vocabulary
from fastrlhf.rollout.generate import no_generation_config
from fastrlhf.runtime.inputs import open_tokenizer, template_day
from fastrlhf.types import Example, Message

HELP = "/system TEXT sets the system message, /reset forgets the conversation, /exit ends; Ctrl-C stops an answer"


@dataclass(kw_only=True)
class Chat:
    """A conversation with a model. Prompts are encoded as in training: by the chat template, with the generation
    prompt. A model without a chat template continues each text, without a memory of earlier ones."""

    config: ChatConfig
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    rules: TextRules = field(repr=False)
    judge: Callable[[Example], float] | None = None
    """Prompt and answer (`reference`) -> score."""
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        limit_vocabulary(self.model, self.tokenizer)
        rows = cast(Any, self.model.get_output_embeddings()).weight.shape[0]
        sampled = self.config.temperature > 0
        self._settings = GenerationConfig(
            do_sample=sampled,
            temperature=self.config.temperature if sampled else None,
            top_k=self.config.top_k if sampled else None,
            top_p=self.config.top_p if sampled else None,
            min_p=self.config.min_p if sampled else None,
            eos_token_id=list(end_ids(self.tokenizer)),
            pad_token_id=end_ids(self.tokenizer)[0],
            suppress_tokens=sorted({*range(rows)} - {*allowed_ids(self.model)}) or None,
        )

    def reset(self) -> None:
        self.turns.clear()

    def ask(self, text: str, out: TextIO) -> float | None:
        """Writes the answer to `text` while it is sampled; if Ctrl-C stops the answer, the part sampled so far is kept.
        Returns its score, None without a judge. Raises ValueError, and forgets `text`, if the conversation is too long
        or the chat template refuses it."""
        talks = bool(self.tokenizer.chat_template)
        prompt: str | list[Message] = text
        if talks:
            before: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*before, *self.turns, {"role": "user", "content": text}]
        try:
            (row,) = encode_rows([Example(prompt=prompt, row=0)], self.tokenizer, fields=(), rules=self.rules)
        except UnusableRow as bad:
            raise ValueError(f"the chat template cannot render the conversation: {bad}") from None
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        most = min(self.config.max_length, positions or self.config.max_length)
        room = min(self.config.response_length, most - len(row.prompt))
        if room < 1:
            raise ValueError(
                f"the conversation has {len(row.prompt)} tokens and no room in {most} for an answer; /reset it"
            )
        answer = self._sample(row.prompt, room, out)
        turn: Message = {"role": "assistant", "content": answer}
        if talks:
            self.turns += [{"role": "user", "content": text}, turn]
        return self.judge(Example(prompt=prompt, reference=[turn] if talks else answer, row=0)) if self.judge else None

    @torch.no_grad()
    def _sample(self, prompt: list[int], room: int, out: TextIO) -> str:
        streamer, kept = _Streamer(self.tokenizer, out), _Kept(len(prompt))
        ids = torch.tensor([prompt], device=self.model.device)
        try:
            with no_generation_config(self.model):
                cast(Any, self.model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings,
                    max_new_tokens=room,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([kept]),
                )
        except KeyboardInterrupt:
            streamer.end()
        if len(kept.ids) == room and kept.ids[-1] not in end_ids(self.tokenizer):
            print(f"(stopped after {room} tokens)", file=out)
        return cast(str, self.tokenizer.decode(kept.ids, skip_special_tokens=True))


class _Streamer(TextStreamer):
    """Writes the answer to `out` instead of standard output."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, file=self._out, flush=True, end="\n" if stream_end else "")


class _Kept(StoppingCriteria):
    """Keeps the ids sampled so far, for an answer that is stopped."""

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt, self.ids = num_prompt, list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.ids = input_ids[0, self._num_prompt :].tolist()
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)


def open_chat(config: ChatConfig) -> Chat:
    """Loads the model, the adapter and the judge. Raises ValueError if one of them is missing or does not fit."""
    check_config(config, ChatConfig, "open_chat")
    config = with_dtype(config)
    if config.adapter and not holds_adapter(config.adapter):
        raise ValueError(f"adapter: {config.adapter!r} holds no adapter (adapter_config.json)")
    if config.reward_model_path and not holds_adapter(config.reward_model_path):
        read_model_config(config.reward_model_path, "reward_model_path", config.trust_remote_code)
    own = config.model_name_or_path if holds_adapter(config.model_name_or_path) else ""
    if own and config.adapter:
        raise ValueError(f"adapter: {own!r} is an adapter itself; give its base model")
    adapter = config.adapter or own
    source = replace(config, model_name_or_path=adapter) if _has_tokenizer(config, adapter) else config
    tokenizer = open_tokenizer(source)
    base = open_base(
        replace(config, model_name_or_path="" if own else config.model_name_or_path), [("adapter", adapter)]
    )
    if base is not None:
        model = policy_role(adapter, base, "adapter")
    else:
        model = open_policy(config, config.model_name_or_path)
    check_vocabulary({"model_name_or_path": model}, tokenizer)
    rules = TextRules.of(config, template_day(config, tokenizer))
    chat = Chat(config=config, model=model.eval(), tokenizer=tokenizer, rules=rules, system=config.system)
    if config.reward_model_path:
        chat.judge = _judge(config, base, tokenizer, rules)
    torch.manual_seed(config.seed)
    return chat


def _has_tokenizer(config: ChatConfig, adapter: str) -> bool:
    return bool(adapter) and not config.tokenizer_name_or_path and (Path(adapter) / "tokenizer_config.json").exists()


def _judge(
    config: ChatConfig, base: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, rules: TextRules
) -> Callable[[Example], float]:
    """Returns a judge that reads each conversation with its own tokenizer and chat template."""
    name, talks = "reward_model_path", bool(tokenizer.chat_template)
    found = judge_tokenizer(name, config.reward_model_path, tokenizer, config, conversations=talks)
    reads = found[0] if found else tokenizer
    model = open_judge(config, base, special_ids(reads)[1])
    check_vocabulary({name: model}, reads)

    def score(example: Example) -> float:
        (row,) = judge_rows(name, [example], reads, ["reference"], rules)
        return score_texts(model, [(row.prompt, row.reference or [])], config.micro_batch_tokens).item()

    return score


def talk(chat: Chat, lines: Iterator[str], out: TextIO) -> None:
    """Answers every line of input and executes the commands that `HELP` lists."""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat.system = rest.strip()
        elif command.startswith("/"):
            print(HELP, file=out)
        elif line.strip():
            try:
                score = chat.ask(line.rstrip("\n"), out)
            except ValueError as error:
                print(f"not answered: {error}", file=out)
                continue
            if score is not None:
                print(f"score {score:.3f}", file=out)


def typed() -> Iterator[str]:
    """Yields the lines that the user types, or the lines of standard input if it is not a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (gives `input` a history and the arrow keys)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stdout)
            return
