"""Tests models and judges with different tokenizers: the judge must score the text of a response, encoded by its own
tokenizer."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf.algorithms import ppo
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.pair_labels import pair_probabilities
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DPOConfig, EvalConfig, PPOConfig
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.evaluation import evaluate
from fastrlhf.evaluation.evaluate import evaluate_models
from fastrlhf.models.loading import build_policy, load_reward_model
from fastrlhf.runtime.metrics import read_rows
from fastrlhf.types import Example
from tests import tiny
from tests.data import vocabularies
from tests.data.chat_templates import CHATML
from tests.data.test_reading import OTHER_TEMPLATE


def save(folder, tokenizer, seed: int, *, judge: bool = False, width: int = 0) -> str:
    """Saves a random model whose embedding has `width` rows more than the tokenizer has ids, and returns the folder."""
    size = len(tokenizer) + width
    model = build_policy(tiny.model_config(), vocab_size=size, eos_token_id=tokenizer.eos_token_id, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    if judge:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
        (folder / "generation_config.json").unlink()
        scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def byte_level():
    tokenizer = vocabularies.byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece():
    tokenizer = vocabularies.sentencepiece(legacy=True)
    tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "bytes": save(folder / "bytes", byte_level(), 1),
        "wide": save(folder / "wide", byte_level(), 2, width=24),
        "pieces": save(folder / "pieces", sentencepiece(), 3),
        "judge": save(folder / "judge", sentencepiece(), 4, judge=True),
        "wide judge": save(folder / "wide judge", byte_level(), 5, judge=True, width=40),
    }


TEXTS = [Example(prompt=f"f{i}: d", reference=" def f", chosen="f", rejected=" d", row=i) for i in range(5)]
TURNS = [
    Example(prompt=[{"role": "user", "content": f"f{i}?"}], reference=[{"role": "assistant", "content": "def"}], row=i)
    for i in range(5)
]


@torch.no_grad()
def score(path: str, prompt, response, *, ended: bool = True) -> float:
    """Returns the score of a text: the judge's own tokenizer encodes the text, and the plain transformers model scores
    it."""
    tokenizer = sentencepiece() if path.endswith("/judge") else byte_level()
    if not response or response[0] == {"role": "assistant", "content": ""}:  # no row of a dataset may be empty
        filled = "f" if isinstance(prompt, str) else [{"role": "assistant", "content": "f"}]
        (row,) = tokenize_examples([Example(prompt=prompt, reference=filled)], tokenizer, max_length=200).examples
        ids = [*row.prompt, *row.reference[-1:]]
        return load_reward_model(path, pad_token_id=0)(torch.tensor([ids])).logits.item()
    (row,) = tokenize_examples([Example(prompt=prompt, reference=response)], tokenizer, max_length=200).examples
    ids = [*row.prompt, *(row.reference if ended else row.reference[:-1])]
    return load_reward_model(path, pad_token_id=0)(torch.tensor([ids])).logits.item()


@pytest.fixture
def answers(monkeypatch):
    """A list that receives the rollouts of every evaluated model, in the order of the models."""
    seen = []
    sample = evaluate.respond
    monkeypatch.setattr(evaluate, "respond", lambda *args, **keys: seen.append(sample(*args, **keys)) or seen[-1])
    return seen


def expected_scores(judge: str, examples, tokenizer, rollouts) -> list[float]:
    """Decodes rollouts and returns the judge's scores of their texts."""
    found = []
    for rollout in rollouts:
        before, ids = tokenizer.decode(rollout.prefix.token_ids), [*rollout.prefix.token_ids, *rollout.completion]
        text = tokenizer.decode(ids)[len(before) :]
        end = next((end for end in ("</s>", "<|im_end|>") if text.endswith(end)), "")
        text = text.removesuffix(end)
        prompt = examples[rollout.prefix.row].prompt
        reply = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        found.append(score(judge, prompt, reply, ended=bool(end)))
    return found


@torch.no_grad()
def scores_of_ids(judge: str, examples, tokenizer, rollouts) -> list[float]:
    model = load_reward_model(judge, pad_token_id=0)
    return [model(torch.tensor([[*each.prefix.token_ids, *each.completion]])).logits.item() for each in rollouts]


def given_scores(folder, name: str) -> list[float]:
    return [row["score"] for row in read_rows(folder / "samples.jsonl") if row["model"] == name]


@pytest.mark.parametrize(("examples", "opponent"), [(TEXTS, "reference"), (TURNS, "reference"), (TEXTS, "pieces")])
def test_models_of_several_tokenizers_are_judged_on_their_text_by_a_judge_of_another(
    paths, tmp_path, caplog, answers, examples, opponent
):
    caplog.set_level("INFO")
    folder = tmp_path / "out"
    config = EvalConfig(
        models=(paths["bytes"], paths["wide"], paths["pieces"]),
        reward_model_path=paths["judge"],
        opponent=paths.get(opponent, opponent),
        response_length=8,
        max_length=128,
        output_dir=str(folder),
    )
    comparisons = evaluate_models(config, examples)
    assert len(comparisons) == 3 - (opponent == "pieces")
    makers = {"bytes": byte_level, "wide": byte_level, "pieces": sentencepiece}
    for (name, make), rollouts in zip(makers.items(), answers, strict=True):
        # The model "pieces" shares the tokenizer of the judge, so its ids are scored directly
        read = scores_of_ids if name == "pieces" else expected_scores
        expected = read(paths["judge"], examples, make(), rollouts)
        assert given_scores(folder, paths[name]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        prompt = {"bytes": PROMPTS[0], "wide": PROMPTS[0], "pieces": PROMPTS[1]}[name][examples is TURNS]
        assert make().decode(rollouts[0].prefix.token_ids) == prompt
    if opponent == "reference":
        expected = [score(paths["judge"], example.prompt, example.reference) for example in examples]
        assert given_scores(folder, opponent) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert f"models: {paths['pieces']} has another tokenizer than the first" in caplog.text
    assert "wide has another" not in caplog.text  # the model "wide" has the first tokenizer and only a wider embedding


PROMPTS = (
    ("f0: d", "<|im_start|>user\nf0?<|im_end|>\n<|im_start|>assistant\n"),
    ("<s> f0: d", "<s> [user] f0?</s> [assistant] "),
)


def test_a_wider_embedding_is_no_other_tokenizer(paths, tmp_path, answers):
    config = EvalConfig(
        models=(paths["bytes"],),
        reward_model_path=paths["wide judge"],
        response_length=8,
        max_length=128,
        output_dir=str(tmp_path / "out"),
    )
    evaluate_models(config, TEXTS)
    model, found = (
        load_reward_model(paths["wide judge"], pad_token_id=0),
        given_scores(tmp_path / "out", paths["bytes"]),
    )
    with torch.no_grad():
        texts = [torch.tensor([[*each.prefix.token_ids, *each.completion]]) for each in answers[0]]
        assert found == pytest.approx([model(text).logits.item() for text in texts], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("examples", [TEXTS, TURNS])
def test_ppo_learns_from_the_scores_that_a_judge_of_another_tokenizer_gives_to_the_text(
    paths, monkeypatch, caplog, examples
):
    seen = []
    sample = ppo.score_episodes

    def keep(config, policy, reference, critic, rollouts, scores, *rest, **keys):
        seen.extend(zip(rollouts, scores.tolist(), strict=True))
        return sample(config, policy, reference, critic, rollouts, scores, *rest, **keys)

    monkeypatch.setattr(ppo, "score_episodes", keep)
    config = PPOConfig(
        model_name_or_path=paths["bytes"],
        reward_model_path=paths["judge"],
        eval_reward_model_path=paths["judge"],
        response_length=8,
        per_device_train_batch_size=5,
        rollout_batch_size=5,
        num_ppo_epochs=1,
        num_mini_batches=1,
        max_steps=1,
        progress=False,
    )
    result = train_ppo(config, examples, examples[:2])
    assert "reward_model_path: the critic cannot start from it, whose tokenizer gives other ids" in caplog.text
    expected = expected_scores(paths["judge"], examples, byte_level(), [rollout for rollout, _ in seen])
    assert [given for _, given in seen] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(seen) == 5
    last = result.history[-1]
    assert last["eval_held_out/scores"] == last["eval_objective/scores"]


def test_a_critic_of_another_tokenizer_is_refused_by_name(paths):
    config = PPOConfig(
        model_name_or_path=paths["bytes"],
        reward_model_path=paths["judge"],
        critic_model_path=paths["judge"],
        response_length=8,
        per_device_train_batch_size=5,
        rollout_batch_size=5,
        num_mini_batches=1,
        max_steps=1,
    )
    with pytest.raises(ValueError, match=r"^critic_model_path: .* has another tokenizer than the run"):
        train_ppo(config, TEXTS)
    with pytest.raises(ValueError, match=r"^ref_model_name_or_path: .* has another tokenizer than the run"):
        train_dpo(DPOConfig(model_name_or_path=paths["bytes"], ref_model_name_or_path=paths["pieces"]), TEXTS)


def test_a_reference_may_have_a_wider_embedding(paths):
    common = {"per_device_train_batch_size": 5, "max_steps": 1, "progress": False}
    config = DPOConfig(model_name_or_path=paths["bytes"], ref_model_name_or_path=paths["wide"], **common)
    (row,) = train_dpo(config, TEXTS).history
    same = replace(config, ref_model_name_or_path="")
    assert row["loss"] != train_dpo(same, TEXTS).history[0]["loss"]


def test_labels_of_pairs_are_those_of_a_judge_that_reads_the_text(paths):
    config = DPOConfig(
        model_name_or_path=paths["bytes"],
        reward_model_path=paths["judge"],
        label_source="reward_model",
        dtype="float32",
        per_device_train_batch_size=5,
        max_steps=1,
        progress=False,
    )
    (row,) = train_dpo(config, TEXTS).history
    margins = [score(paths["judge"], e.prompt, e.chosen) - score(paths["judge"], e.prompt, e.rejected) for e in TEXTS]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-5)  # soft labels of a policy that equals its reference
    rows = tokenize_examples(TEXTS, byte_level(), max_length=99, keep_source=True).examples
    found = pair_probabilities(config, rows, [], byte_level())
    assert found is not None
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor(margins).double()), rtol=1e-5, atol=1e-6)
