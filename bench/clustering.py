"""Measures how fast answers are grouped by meaning.

RLP-SPG batches its questions: each call of the NLI model contains one question for every prompt. The baseline is a loop
over pairs of answers with one call per direction, as in the code that RLP cites (Kuhn et al. 2023, arXiv 2302.09664).
Posts and summaries come from the embedded task. The NLI model is a BERT with random weights. The weights do not affect
its speed. They affect the groups, and therefore the number of questions, but equally for all methods.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch
from transformers import BertConfig, BertForSequenceClassification

from bench.results import append_row, device_name
from fastrlhf.algorithms.rlp_spg import group_answers, num_needed
from fastrlhf.data.toy import ToyTask, toy_tokenizer
from fastrlhf.evaluation.equivalence import Comparison, EquivalenceJudge, NLIJudge, Relation

NUM_ANSWERS, NUM_DISTINCT, LAYERS, SIDE_TOKENS = 10, 6, 2, 48
Groups = list[list[int] | None]


def run_clustering(widths: Sequence[int], num_prompts: int, rounds: int, out: Path) -> str:
    """Times every grouping method on one CPU thread and returns the table in Markdown.

    The methods run alternately, `rounds` times each. For each width and method, a row with the CPU seconds of the
    fastest round is appended to the files in `out`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = ["| width | way | questions per prompt | prompts per second | times |", "|---|---|---|---|---|"]
    for width in widths:
        rows = _measure(width, num_prompts, rounds)
        for row in rows:
            append_row({"bench": "clustering", "device": device_name("cpu"), "threads": 1, **row}, out)
            lines.append(
                f"| {width} | {row['way']} | {row['questions'] / num_prompts:.1f} | {num_prompts / row['seconds']:.1f} "
                f"| {rows[0]['seconds'] / row['seconds']:.1f} |"
            )
    torch.set_num_threads(threads)
    return "\n".join(lines)


def _measure(width: int, num_prompts: int, rounds: int) -> list[dict]:
    prompts, texts = draw_answers(num_prompts)
    with TemporaryDirectory() as folder:
        judge = NLIJudge(
            save_nli(Path(folder), width), device="cpu", dtype="float32", batch_tokens=16384, side_tokens=SIDE_TOKENS
        )
    asked = Counted(judge)
    ways: dict[str, Callable[[], Groups]] = {
        "one at a time": lambda: [
            one_at_a_time(prompt, answers, asked) for prompt, answers in zip(prompts, texts, strict=True)
        ],
        "waves": lambda: group_answers(prompts, texts, asked, "strict"),
        "waves, early reject": lambda: group_answers(prompts, texts, asked, "strict", num_needed(0.5, NUM_ANSWERS)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found, questions = {}, {}
    for _ in range(rounds):
        for way, grouped in ways.items():
            asked.questions, start = 0, process_time()
            found[way] = grouped()
            seconds[way].append(process_time() - start)
            questions[way] = asked.questions
    alike = sum(map(list.__eq__, found["one at a time"], found["waves"]))
    if alike < num_prompts:
        raise RuntimeError(f"width {width}: the groups of {num_prompts - alike} prompts depend on the batching")
    shared = {"width": width, "layers": LAYERS, "prompts": num_prompts, "answers": NUM_ANSWERS, "rounds": rounds}
    return [shared | {"way": way, "questions": questions[way], "seconds": min(seconds[way])} for way in ways]


class Counted:
    """Wraps a judge and counts the questions that it is asked."""

    def __init__(self, judge: EquivalenceJudge) -> None:
        self.judge, self.questions = judge, 0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Relation]:
        self.questions += len(comparisons)
        return self.judge(comparisons)


def one_at_a_time(prompt: str, answers: Sequence[str], judge: EquivalenceJudge) -> list[int]:
    """The baseline: groups answers with one call of the judge per direction; returns the group of each answer.

    An answer joins the first group whose first member entails it and is entailed by it; otherwise it starts a group.
    """
    firsts: list[str] = []
    groups: list[int] = []
    for answer in answers:
        for group, first in enumerate(firsts):
            directions = [] if first == answer else [(first, answer), (answer, first)]
            said = [judge([Comparison(prompt, *direction)]) for direction in directions]
            if said.count([Relation.ENTAILMENT]) == len(said):
                groups.append(group)
                break
        else:
            groups.append(len(firsts))
            firsts.append(answer)
    return groups


def draw_answers(num_prompts: int) -> tuple[list[str], list[list[str]]]:
    """Draws posts with ten answers each, of which at most six are different."""
    draw = random.Random(0)
    posts = ToyTask(seed=0).examples("preferences", num_prompts)
    texts = sorted({str(text) for post in posts for text in (post.chosen, post.rejected)})
    answers = [draw.choices(draw.sample(texts, NUM_DISTINCT), k=NUM_ANSWERS) for _ in posts]
    return [str(post.prompt) for post in posts], answers


def save_nli(folder: Path, width: int) -> str:
    """Saves a two-layer BERT with random weights as NLI model and returns its folder.

    Its three labels are about equally likely.
    """
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(folder)
    labels = ("contradiction", "neutral", "entailment")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=2 * SIDE_TOKENS,
        initializer_range=width**-0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        logits = model(input_ids=torch.randint(4, len(tokenizer), (64, 2 * SIDE_TOKENS))).logits
        model.classifier.bias -= logits.mean(0)
    model.save_pretrained(folder)
    return str(folder)
