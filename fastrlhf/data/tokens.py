"""Examples as token ids: prompt and response tokenised apart, their ids concatenated and never tokenised again.

The same ids are trained on, scored and sampled from, so no span is ever searched for in a re-tokenised text.

The EOS rule: every response ends in EOS. It is appended where the text does not end in it already (white space after it
is dropped), and missing only where `max_length` cut the response. A prompt never gets one.
The BOS rule: what the tokenizer puts before a text stands before a text prompt; a chat template writes its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastrlhf.data.examples import RESPONSES
from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.data.specials import add_ends, end_ids, split_end, template_end
from fastrlhf.data.tokenizer import resolve_chat_template
from fastrlhf.types import Example, Message, TokenizedExample

TruncationMode = Literal["keep_start", "keep_end", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """What tokenising did. Every kept response is counted once under eos_added, eos_present or responses_cut."""

    num_examples: int
    num_kept: int
    max_length: int
    eos_added: int
    """Responses that got an EOS."""
    eos_present: int
    """Responses whose text ended in the EOS token already."""
    responses_cut: int
    """Responses that lost their end, and so have no EOS (keep_start)."""
    prompts_cut: int
    """Prompts that lost their beginning (keep_end)."""
    dropped: dict[str, int]
    """Reason -> rows."""
    first_dropped: dict[str, int]
    """Reason -> row number of the first one."""

    @property
    def truncated(self) -> int:
        return self.responses_cut + self.prompts_cut

    def summary(self) -> str:
        """For the header of a run."""
        responses = self.eos_added + self.eos_present + self.responses_cut
        parts = [f"{self.num_kept:,} of {self.num_examples:,} rows within {self.max_length:,} tokens"]
        if responses:
            parts.append(f"{self.eos_present:,} of {responses:,} responses end in EOS, added to {self.eos_added:,}")
            parts.append(f"cut: {self.responses_cut:,} responses, {self.prompts_cut:,} prompts")
        else:  # rows of prompts alone
            parts.append(f"cut: {self.prompts_cut:,} prompts")
        for reason, count in self.dropped.items():
            parts.append(f"dropped {count:,} for {reason} (first: row {self.first_dropped[reason]})")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExamples:
    examples: list[TokenizedExample] = field(repr=False)
    report: TokenReport


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_mode: TruncationMode = "keep_start",
    fields: Sequence[str] = RESPONSES,
    chat_template: str | None = None,
) -> TokenizedExamples:
    """Token ids of prompts and of the responses named by `fields`, the groups of `responses` among them; other
    responses are left out, labels are kept.

    A conversation goes through the chat template: the prompt with the generation prompt, the response as what the
    template writes after it once the response is there.

    A row longer than `max_length` tokens, prompt and longest response together, is treated as a whole:
        keep_start    the ends of its responses are cut, and their EOS with them; dropped if the prompt leaves no room
        keep_end      the beginning of its prompt is cut (a BOS stays); dropped if a response leaves it no room
        drop          dropped
    A row without responses fits up to `max_length` itself. Dropped, too: a prompt or response without
    tokens, a response that goes on after an EOS, and a pair whose chosen and rejected are the same tokens.

    Args:
        chat_template: instead of the tokenizer's: Jinja, or "hh".

    Raises:
        ValueError: no EOS, no chat template for a conversation, a template that fails on a row or does not continue the
            prompt as it rendered it, a bad argument, or no row left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} tokens hold no prompt and response; give 2 or more")
    if truncation_mode not in ("keep_start", "keep_end", "drop"):
        raise ValueError(f"truncation_mode: {truncation_mode!r} is not one of keep_start, keep_end, drop")
    known = (*RESPONSES, "responses")
    if unknown := set(fields) - set(known):
        raise ValueError(f"fields: {sorted(unknown)} not among {', '.join(known)}")
    template = resolve_chat_template(chat_template, tokenizer) if chat_template else None
    ends, bos = _ends(tokenizer, template), cast(int | None, tokenizer.bos_token_id)
    fields = [name for name in known if name in fields]

    texts = [_render(example, fields, tokenizer, template) for example in examples]
    prompts = _encode_prompts(examples, [text["prompt"] for text in texts], tokenizer)
    bodies, found = _encode_responses([text[name] for text in texts for name in list(text)[1:]], tokenizer, ends)

    kept: list[TokenizedExample] = []
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, int] = {}
    response = iter(zip(bodies, found, strict=True))
    for example, text, prompt in zip(examples, texts, prompts, strict=True):
        read = {name: next(response) for name in list(text)[1:]}
        whole = {name: [*body, next(iter(ends)) if end is None else end] for name, (body, end) in read.items()}
        reason, prompt_ids, ids = _fit(prompt, whole, max_length, truncation_mode, bos, ends.keys())
        if reason:
            dropped[reason] += 1
            first_dropped.setdefault(reason, example.row)
            continue
        kept.append(_tokenized(example, prompt_ids, ids))
        counts["prompts_cut"] += prompt_ids != prompt
        for name, (_, end) in read.items():
            cut = len(ids[name]) < len(whole[name])
            counts["responses_cut" if cut else "eos_added" if end is None else "eos_present"] += 1
    report = TokenReport(
        num_examples=len(examples),
        num_kept=len(kept),
        max_length=max_length,
        eos_added=counts["eos_added"],
        eos_present=counts["eos_present"],
        responses_cut=counts["responses_cut"],
        prompts_cut=counts["prompts_cut"],
        dropped=dict(dropped.most_common()),
        first_dropped=first_dropped,
    )
    if not kept:
        raise ValueError(
            f"no row is left after tokenising; max_length or truncation_mode may mend it: {report.summary()}"
        )
    return TokenizedExamples(examples=kept, report=report)


def _render(
    example: Example, fields: Iterable[str], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> dict[str, str]:
    """The prompt, which comes first, and the responses that the example has, as texts to tokenise apart."""
    responses = {name: value for name in fields if (value := getattr(example, name)) is not None}
    for i, value in enumerate(responses.pop("responses", ())):
        responses[f"responses[{i}]"] = value
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt, **responses}
    if not (template or tokenizer.chat_template):
        raise ValueError(
            f"row {example.row} is a conversation and tokenizer {tokenizer.name_or_path} has no chat template; "
            'give one with chat_template: Jinja, or "hh" for Human/Assistant text'
        )
    texts = {"prompt": _apply(example.prompt, example.row, tokenizer, template, add_generation_prompt=True)}
    for name, turns in responses.items():
        whole = _apply(example.prompt + turns, example.row, tokenizer, template, add_generation_prompt=False)
        if not whole.startswith(texts["prompt"]):
            raise ValueError(f"row {example.row}, {name}: {_first_difference(texts['prompt'], whole)}")
        texts[name] = whole.removeprefix(texts["prompt"])
    return texts


def _tokenized(example: Example, prompt: list[int], ids: dict[str, list[int]]) -> TokenizedExample:
    group = [response for name, response in ids.items() if name.startswith("responses[")]
    return TokenizedExample(
        prompt=prompt,
        responses=group or None,
        row=example.row,
        **{name: response for name, response in ids.items() if name in RESPONSES},
        **{name: getattr(example, name) for name in (*GROUP_LABELS, *PAIR_LABELS)},
    )


def _apply(
    turns: list[Message],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"row {row}: the chat template refuses it: {error}") from None
    return cast(str, text)


def _first_difference(prompt: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    start = max(0, at - 20)
    return (
        f"the chat template does not continue the prompt: at character {at} the prompt alone has "
        f"{prompt[start : at + 40]!r}, with the response it is {whole[start : at + 40]!r}; "
        "give a chat_template whose generation prompt is also what stands before a finished answer"
    )


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def _encode_prompts(
    examples: Sequence[Example], texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    ids: dict[int, list[int]] = {}
    for plain in (True, False):
        rows = [row for row, example in enumerate(examples) if isinstance(example.prompt, str) == plain]
        encoded = _encode([texts[row] for row in rows], tokenizer, add_special_tokens=plain)
        ids.update(zip(rows, encoded, strict=True))
    # some tokenizers close every text with EOS; a prompt goes on
    closed = [
        ids[row][-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token))
        for row, text in enumerate(texts)
    ]
    return [ids[row][:-1] if closed[row] else ids[row] for row in range(len(texts))]


def _ends(tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[int, str]:
    """Id -> text of the tokens that end a response, the EOS first."""
    if template and (end := template_end(tokenizer, template)) is not None:
        add_ends(tokenizer, [end], "chat_template")
    ids = end_ids(tokenizer)
    return dict(zip(ids, map(str, tokenizer.convert_ids_to_tokens(list(ids))), strict=True))


def _encode_responses(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, str]
) -> tuple[list[list[int]], list[int | None]]:
    """Ids without the end of the response, and the id of that; None where the text has none."""
    ids_of = {text: token for token, text in ends.items()}
    parts = [split_end(text, ids_of) for text in texts]
    bodies = _encode([body for body, _, _ in parts], tokenizer, add_special_tokens=False)
    return bodies, [ids_of.get(end) for _, end, _ in parts]


def _fit(
    prompt: list[int],
    responses: dict[str, list[int]],
    max_length: int,
    mode: TruncationMode,
    bos: int | None,
    ends: Set[int],
) -> tuple[str, list[int], dict[str, list[int]]]:
    """(reason to drop or "", prompt, responses within `max_length`). Responses end in one of `ends`."""
    if not prompt:
        return "empty_prompt", prompt, responses
    if any(len(ids) == 1 for ids in responses.values()):
        return "empty_response", prompt, responses
    if any(not ends.isdisjoint(ids[:-1]) for ids in responses.values()):
        return "eos_inside_response", prompt, responses
    longest = max(map(len, responses.values()), default=0)
    if len(prompt) + longest > max_length:
        if mode == "drop" or (mode == "keep_start" and not responses):
            return "longer_than_max_length", prompt, responses
        if mode == "keep_start":
            if len(prompt) >= max_length:
                return "prompt_fills_max_length", prompt, responses
            responses = {name: ids[: max_length - len(prompt)] for name, ids in responses.items()}
        else:
            head = prompt[:1] if prompt[0] == bos else []
            room = max_length - longest - len(head)
            if room < 1:
                return "response_fills_max_length", prompt, responses
            prompt = head + prompt[-room:]
    if "chosen" in responses and responses["chosen"] == responses.get("rejected"):
        return "chosen_equals_rejected", prompt, responses
    return "", prompt, responses
