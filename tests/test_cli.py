"""End-to-end tests of the command line, in this process, on tiny files."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf import __version__
from fastrlhf.cli import USAGE, _fail, _run_first, main
from fastrlhf.config import RTOConfig
from fastrlhf.config.command_line import parse
from fastrlhf.runtime.metrics import read_metrics
from tests import tiny
from tests.resumable import untimed

SECTIONS = {
    "shared": {
        "max_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "num_eval_examples": 8,
        "progress": False,
        "seed": 3,
    },
    "sft": {
        "tokenizer_name_or_path": "tokenizer",
        "dataset_name": "demonstrations.jsonl",
        "model_config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "reward": {"model_name_or_path": "runs/sft", "dataset_name": "pairs.jsonl"},
    "dpo": {"model_name_or_path": "runs/sft", "dataset_name": "pairs.jsonl", "beta": 0.5},
    "ppo": {"model_name_or_path": "runs/sft", "reward_model_path": "runs/reward", "dataset_name": "pairs.jsonl"},
    "drpo": {
        "model_name_or_path": "runs/sft",
        "reward_model_path": "runs/reward",
        "dataset_name": "demonstrations.jsonl",
        "value_learning_rate": None,
    },
    "rto": {
        "model_name_or_path": "runs/sft",
        "reward_model_path": "runs/reward",
        "dpo_model_path": "runs/dpo",
        "dataset_name": "demonstrations.jsonl",
    },
    "eval": {
        "models": ["runs/sft", "runs/dpo"],
        "reward_model_path": "runs/reward",
        "dataset_name": "demonstrations.jsonl",
        "response_length": 6,
    },
}
CHAIN = ("sft", "reward", "dpo", "ppo", "drpo", "rto")
ON_POLICY = {"response_length": 6, "num_ppo_epochs": 1}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, two data files and a settings file; it is the working directory during a test."""
    folder = tmp_path_factory.mktemp("place")
    examples = tiny.examples(24)
    write_lines(folder / "demonstrations.jsonl", [{"prompt": e.prompt, "completion": e.reference} for e in examples])
    write_lines(
        folder / "pairs.jsonl", [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in examples]
    )
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    sections = {name: dict(keys) for name, keys in SECTIONS.items()}
    for command in ("ppo", "drpo", "rto"):
        sections[command] |= ON_POLICY
    for command in CHAIN:
        sections[command]["output_dir"] = f"runs/{command}"
    (folder / "all.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chain(place):
    """Runs every training command once, in order; returns the exit codes."""
    before = Path.cwd()
    os.chdir(place)
    try:
        return {command: main([command, "--config", "all.yaml"]) for command in CHAIN}
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must fail; returns the single line that it prints, without the command's name."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith(f"fastrlhf {arguments[0]}: ")
    return printed.err.strip().removeprefix(f"fastrlhf {arguments[0]}: ")


def test_every_trainer_runs_from_one_file_of_sections(chain, place):
    assert chain == dict.fromkeys(CHAIN, 0)
    for command in chain:
        folder = place / "runs" / command
        assert len(read_metrics(folder / "metrics.jsonl")) == 2
        kind = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
        assert kind.from_pretrained(folder).config.vocab_size == tiny.VOCAB
    # The file overrides the defaults, and a section overrides shared keys.
    assert yaml.safe_load((place / "runs/dpo/config.yaml").read_text())["beta"] == 0.5
    assert yaml.safe_load((place / "runs/drpo/config.yaml").read_text())["missing_eos_score"] == -1.0


def test_eval_prints_a_win_rate_per_model(chain, capsys):
    assert main(["eval", "--config", "all.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["judged", "model", "runs/sft", "runs/dpo", "reference"]
    assert ("judged by runs/reward, " in lines[0], "win rate % vs reference" in lines[1]) == (True, True)
    assert all(line.endswith("  8") for line in lines[2:4])  # last column: 8 prompts, which no trainer has seen


def test_one_command_runs_the_sections_before_it_that_have_not_run(place, capsys):
    sections = yaml.safe_load((place / "all.yaml").read_text())
    moved = yaml.safe_load(yaml.safe_dump(sections).replace("runs/", "chain/"))
    moved["rto"]["run_first"] = ["sft", "reward", "dpo"]
    (place / "chain.yaml").write_text(yaml.safe_dump(moved), encoding="utf-8")
    assert main(["sft", "--config", "chain.yaml"]) == 0
    finished = (place / "chain/sft/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()

    assert main(["rto", "--config=chain.yaml", "--seed", "4"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "sft: chain/sft holds a finished run; skipped"
    assert [line for line in told if line.endswith(":")] == ["reward:", "dpo:", "rto:"]
    trained = [line.removeprefix("saved in chain/") for line in told if line.startswith("saved")]
    assert trained == ["reward", "dpo", "rto"]
    assert (place / "chain/sft/model.safetensors").stat().st_mtime_ns == finished
    assert "rto/share_of_return" in read_metrics(place / "chain/rto/metrics.jsonl")[0]
    seeds = [yaml.safe_load((place / f"chain/{x}/config.yaml").read_text())["seed"] for x in ("reward", "dpo", "rto")]
    assert seeds == [3, 3, 4]  # --seed 4 applies to rto only


def test_a_section_that_a_flag_has_replaced_is_not_trained(place, chain, capsys):
    sections = yaml.safe_load((place / "all.yaml").read_text())
    moved = yaml.safe_load(yaml.safe_dump(sections).replace("runs/", "flagged/"))
    moved["rto"]["run_first"] = ["sft", "reward", "dpo"]
    (place / "flagged.yaml").write_text(yaml.safe_dump(moved), encoding="utf-8")
    capsys.readouterr()

    assert main(["rto", "--config", "flagged.yaml", "--dpo_model_path", "runs/dpo"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "dpo: a flag has replaced flagged/dpo; skipped"
    assert [line for line in told if line.endswith(":")] == ["sft:", "reward:", "rto:"]
    assert not (place / "flagged/dpo").exists()

    replaced = ["--model_name_or_path", "runs/sft", "--dpo_model_path", "runs/dpo"]
    config = parse(RTOConfig, ["--config", "flagged.yaml", *replaced], "rto")
    needed = [name for name, _ in _run_first("rto", config, ["flagged.yaml"])]
    assert needed == ["sft", "reward"]  # the reward model needs sft, rto no longer does
    capsys.readouterr()

    given = {"model_name_or_path": "sft", "reward_model_path": "reward", "dpo_model_path": "dpo"}
    flags = [part for key, name in given.items() for part in (f"--{key}", f"runs/{name}")]
    assert main(["rto", "--config", "flagged.yaml", *flags, "--output_dir", "flagged/alone"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [f"{x}: a flag has replaced flagged/{x}; skipped" for x in ("dpo", "reward", "sft")]


def test_a_finished_section_with_changed_settings_is_refused(place, chain, capsys):
    sections = yaml.safe_load((place / "all.yaml").read_text())
    sections["rto"] |= {"run_first": ["sft", "dpo"], "output_dir": "runs/changed"}
    sections["dpo"]["beta"] = 0.25
    (place / "changed.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    told = fails(capsys, "rto", "--config", "changed.yaml")
    assert told == (
        "dpo: runs/dpo holds a run with other settings: beta was 0.5 and is 0.25; give the section another output_dir, "
        "or remove the folder"
    )
    assert not (place / "runs/changed").exists()


def test_rlp_uses_models_of_other_sections_and_continues_where_it_stopped(chain, place, capsys):
    sections = yaml.safe_load((place / "all.yaml").read_text())
    own = {
        "refinement": "both",
        "equivalence": "exact",
        "num_answers": 3,
        "views_per_step": 2,
        "min_reward_variance": 0,
    }
    sections["rlp"] = own | {"output_dir": "runs/rlp", "policy": "drpo", "run_first": ["sft"], "min_confidence": 0}
    (place / "rlp.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    capsys.readouterr()
    assert main(["rlp", "--config", "rlp.yaml"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "sft: runs/sft holds a finished run; skipped"
    assert any(line.startswith("rlp/rm_accuracy_offline_after 0.") for line in told)
    assert told[-1] == "saved in runs/rlp/round-1/policy"
    resolved = yaml.safe_load((place / "runs/rlp/round-1/policy/config.yaml").read_text())
    assert (resolved["missing_eos_score"], resolved["reward_model_path"]) == (-1.0, "runs/rlp/round-1/reward")
    policies = {file: file.stat().st_mtime_ns for file in (place / "runs/rlp").rglob("*.safetensors")}
    assert len(policies) == 6  # two reward models, two policies and their critics
    assert main(["rlp", "--config", "rlp.yaml"]) == 0
    assert {file: file.stat().st_mtime_ns for file in policies} == policies
    message = "--config: must be one file with sections rlp, reward and ppo; got []"
    assert fails(capsys, "rlp", "--output_dir", "runs/other") == message
    assert "section rlp (set it" in fails(capsys, "rlp", "--config", "rlp.yaml", "--max_length", "32")


def test_a_mistake_in_a_later_section_is_found_before_an_earlier_one_runs(place, capsys):
    sections = yaml.safe_load((place / "all.yaml").read_text())
    late = yaml.safe_load(yaml.safe_dump(sections).replace("runs/", "late/"))
    late["rto"]["run_first"] = ["sft", "dpo"]
    for key, value, message in (
        ("beta", 0.0, "dpo: beta: must be above 0"),
        ("output_dir", "", "dpo: output_dir: must be the folder of the dpo run"),
        ("output_dir", "tokenizer", "output_dir: 'tokenizer' is not empty"),
        ("dataset_name", "nowhere.jsonl", "dpo: nowhere.jsonl: no such file or folder"),
        ("model_name_or_path", "late/sfft", "dpo: model_name_or_path: 'late/sfft' is neither a local folder nor"),
    ):
        spoilt = late | {"dpo": late["dpo"] | {key: value}}
        (place / "late.yaml").write_text(yaml.safe_dump(spoilt), encoding="utf-8")
        assert message in fails(capsys, "rto", "--config", "late.yaml")
    assert not (place / "late").exists()


def test_report_writes_a_page_of_a_run_and_says_where(chain, capsys):
    assert main(["report", "runs/drpo"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == Path("runs/drpo/report.html")
    assert "objective/scores" in page.read_text(encoding="utf-8")


def test_a_run_prints_its_last_evaluation_and_its_folder(chain, capsys):
    assert main(["dpo", "--config", "all.yaml", "--output_dir", "runs/dpo_again"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "eval_loss" in out[0]
    assert out[-1] == "saved in runs/dpo_again"


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "drpo", "rto"])
def test_the_written_configuration_gives_the_same_run_bit_for_bit(chain, place, command):
    again = f"runs/{command}_twin"
    assert main([command, "--config", f"runs/{command}/config.yaml", "--output_dir", again]) == 0

    def metrics(folder):
        return [untimed(row) for row in read_metrics(place / folder / "metrics.jsonl")]

    assert metrics(again) == metrics(f"runs/{command}")
    written = [yaml.safe_load((place / folder / "config.yaml").read_text()) for folder in (f"runs/{command}", again)]
    assert {key for key in written[0] if written[0][key] != written[1][key]} == {"output_dir"}
    kind = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    models = [kind.from_pretrained(folder) for folder in (f"runs/{command}", again)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sfft"], "unknown command 'sfft'; did you mean 'sft'?; fastrlhf --help lists them"),
        (["sft", "--leaning_rate", "1"], "unknown key --leaning_rate; did you mean 'learning_rate'?"),
        (["sft", "--max_steps", "many"], "--max_steps: invalid literal for int() with base 10: 'many'"),
        (["sft", "--max_steps", "1.5"], "--max_steps: invalid literal for int() with base 10: '1.5'"),
        (["sft", "--max_steps"], "Missing value for argument '--max_steps'"),
        (["sft", "--progress", "maybe"], "'--progress'. Expected one of ('True', 'False')"),
        (
            ["dpo", "--loss_type", "dpo"],
            "loss_type: must be one of sigmoid, ipo, hinge, robust, apo_zero, apo_down, simpo, ",
        ),
        (["sft", "all.yaml"], "Unrecognized options: all.yaml"),
        (["sft", "--learning_rate", "-1"], "learning_rate: must be above 0; got -1.0"),
        (["sft", "--learning_rate", "nan"], "learning_rate: must be finite; got nan"),
        (["drpo", "--missing_eos_penalty", "1"], "missing_eos_penalty: must be null when missing_eos_score is given"),
        (["ppo", "--reset_prob", "1.5"], "reset_prob: must be in 0..1; got 1.5"),
        (["sft", "--config"], "--config: give a file or the name of a recipe"),
        (["sft", "--config", "nowhere.yaml"], "config: no file 'nowhere.yaml'; the recipes are dpo_hh, "),
        (["sft", "--max_steps", "1"], "output_dir: must be the folder of the sft run; got ''"),
        (["report"], "RUN_DIR: must be the folder of a run, or of several; got []"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_key(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_a_mistake_in_the_file_is_one_line_too(capsys, tmp_path):
    def told(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return fails(capsys, "sft", "--config", str(tmp_path / "run.yaml"))

    assert "run.yaml: unknown key 'max_step'; did you mean 'max_steps'?" in told("max_step: 3")
    assert "run.yaml: not valid YAML" in told("a: [1\nb: {")
    assert "--max_steps: invalid literal for int()" in told("max_steps: many")
    assert "max_steps: must be at least 1, or -1 for epochs; got 0" in told("max_steps: 0")


def test_an_error_of_the_operating_system_is_one_line(capsys, chain):
    assert "output_dir: 'all.yaml/run' cannot be made: 'all.yaml' is a file" in fails(
        capsys, "sft", "--config", "all.yaml", "--output_dir", "all.yaml/run"
    )


def test_control_characters_of_names_are_escaped_in_messages_and_letters_are_not(capsys):
    assert main(["sft", "--config", "\x1b[31m\u202e\u00e9.yaml"]) == 2
    told = "fastrlhf sft: config: no file '\\x1b[31m\\u202e\u00e9.yaml'"
    assert capsys.readouterr().err.startswith(told)
    _fail("report", "\x1b[2J\u00e9: no column", 2)
    assert capsys.readouterr().err == "fastrlhf report: \\x1b[2J\u00e9: no column\n"


def test_a_long_value_in_a_message_stays_whole(capsys):
    name = "x" * 200
    assert f"no file '{name}.yaml'" in fails(capsys, "sft", "--config", f"{name}.yaml")


def test_the_list_of_commands(capsys):
    assert main(["--help"]) == 0
    assert main(["report", "--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out == f"{USAGE}\n" * 3


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrlhf {__version__}\n"


def test_an_interrupted_run_ends_with_130(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrlhf.algorithms.sft.train_sft", interrupt)
    assert main(["sft", "--output_dir", "runs/interrupted"]) == 130
    assert capsys.readouterr().err == "fastrlhf sft: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_a_checkpoint_is_saved_and_the_same_command_continues(
    number, code, chain, place, capsys, monkeypatch
):
    command = ["sft", "--config", "all.yaml", "--output_dir", f"runs/stopped-{code}"]
    step, calls = torch.optim.AdamW.step, []

    def signalled(optimizer, *arguments):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(number)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    assert main(command) == code
    saved = Path(f"runs/stopped-{code}/checkpoint-1").absolute()
    told = f"fastrlhf sft: interrupted after step 1, saved as {saved}; the same command continues"
    assert capsys.readouterr().err.splitlines()[-1] == told
    assert main(command) == 0
    assert len(calls) == 2
    weights = [(place / "runs" / name / "model.safetensors").read_bytes() for name in ("sft", f"stopped-{code}")]
    assert weights[0] == weights[1]


def test_a_base_install_reports_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "fastrlhf sft: needs tyro: pip install 'fastrlhf[train]'\n"
