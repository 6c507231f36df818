import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, two adapters over it, and a reward adapter."""
    place = tmp_path_factory.mktemp("merge")
    base = tiny.save_policy(place / "base")
    for name, seed in (("one", 1), ("two", 2)):
        tiny.save_adapter(place / name, base, seed)
    tiny.save_adapter(place / "run", base, 3)
    tiny.save_adapter(place / "judge", base, 4, scores=True)
    tiny.save_adapter(place / "dora", base, 5, use_dora=True)
    return place


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def updates(folder, factor=1.0) -> dict[str, torch.Tensor]:
    """Returns name of a weight -> its update by the adapter, in float64, from the files that peft writes."""
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter_config.json").read_text())
    matrices = load_file(folder / "adapter_model.safetensors")
    scale = factor * settings["lora_alpha"] / settings["r"]
    found = {}
    for name, a in matrices.items():
        if ".lora_A." in name:
            b = matrices[name.replace("lora_A", "lora_B")]
            found[name.removeprefix("base_model.model.").replace(".lora_A", "")] = scale * b.double() @ a.double()
    assert found
    return found


@pytest.mark.parametrize(("factors", "given"), [((1.0, 1.0), []), ((0.7, -0.3), ["--adapter_weights", "0.7", "-0.3"])])
def test_the_merged_weights_are_the_base_plus_the_weighted_updates(folders, tmp_path, capsys, factors, given):
    out = tmp_path / "out"
    assert main(["merge", str(folders / "one"), str(folders / "two"), *given, "--output_dir", str(out)]) == 0
    assert capsys.readouterr().out == f"saved in {out}, in float32\n"
    expected = {name: weight.double() for name, weight in weights(folders / "base").items()}
    for folder, factor in zip(("one", "two"), factors, strict=True):
        for name, update in updates(folders / folder / "adapter", factor).items():
            expected[name] = expected[name] + update
    merged = weights(out)
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert AutoTokenizer.from_pretrained(out)("w0 w1")["input_ids"] == [3, 4]


def test_a_run_stands_for_its_adapter_and_rounding_is_measured(folders, tmp_path, capsys):
    assert main(["merge", str(folders / "run"), "--output_dir", str(tmp_path / "exact")]) == 0
    rounded = ["--dtype", "bfloat16", "--output_dir", str(tmp_path / "rounded")]
    assert main(["merge", str(folders / "run" / "adapter"), *rounded]) == 0
    exact, base = weights(tmp_path / "exact"), weights(folders / "base")
    names = updates(folders / "run" / "adapter")
    lost = sum((exact[n] - exact[n].bfloat16().float()).double().square().sum().item() for n in names)
    changed = sum((exact[n] - base[n]).double().square().sum().item() for n in names)
    share = 100 * (lost / changed) ** 0.5
    told = f"bfloat16 loses {share:.0f} % of the adapters' update by rounding; float32 loses nothing\n"
    assert capsys.readouterr().out.endswith(f"saved in {tmp_path / 'rounded'}, in bfloat16\n{told}")
    assert 0.1 < share < 50
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto").state_dict()
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in saved.items())


def test_a_reward_adapter_gives_a_reward_model_with_its_head(folders, tmp_path):
    from safetensors.torch import load_file

    assert main(["merge", str(folders / "judge"), "--output_dir", str(tmp_path / "out")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    saved = load_file(folders / "judge" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(model.score.weight.data, saved["base_model.model.score.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "adapters: must be the folder of at least one adapter; got ()"),
        (["base"], "holds no adapter (adapter_config.json); give the folder of an adapter"),
        (["one", "two", "--adapter_weights", "1"], "adapter_weights: must be one number per adapter; got (1.0,)"),
        (["one", "dora"], "adapters: one is a DoRA, whose update is not a sum; merge it by itself, without a factor"),
        (
            ["judge", "--adapter_weights", "2"],
            "adapters: one was trained together with all of score; merge it",
        ),
        (["one", "judge"], "adapters: one was trained together with all of score; merge it"),
        (["one", "--learning_rate", "1"], "learning_rate"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_leaves_no_folder(folders, tmp_path, capsys, arguments, message):
    places = [str(folders / word) if (folders / word).exists() else word for word in arguments]
    assert main(["merge", *places, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastrlhf merge: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_model_is_not_overwritten(folders, capsys):
    assert main(["merge", str(folders / "one"), "--output_dir", str(folders / "base")]) == 2
    assert "already holds a model; choose another folder or move it away" in capsys.readouterr().err
