import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from fastrlhf.config import (
    CONFIGS,
    DPOConfig,
    DRPOConfig,
    EvalConfig,
    PPOConfig,
    RewardConfig,
    RTOConfig,
    SFTConfig,
)
from fastrlhf.config.command_line import parse
from fastrlhf.config.files import (
    COMMANDS,
    RECIPES,
    as_flags,
    as_yaml,
    check_flags,
    names_folder,
    read_yaml,
    run_first,
)


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return to_file


def test_a_flat_file_gives_its_keys(write):
    path = write("learning_rate: 1e-4\nmax_steps: 3\nreport_to: [wandb]\n")
    expected = {"learning_rate": 1e-4, "max_steps": 3, "report_to": ["wandb"]}
    assert read_yaml(path, SFTConfig, "sft") == expected
    assert parse(SFTConfig, ["--config", path], "sft") == SFTConfig(
        learning_rate=1e-4, max_steps=3, report_to=("wandb",)
    )


def test_a_section_overrides_shared_keys_and_not_other_sections(write):
    path = write("shared: {seed: 1, max_length: 64}\nsft: {seed: 2}\ndpo: {beta: 0.3}\nreward:\n")
    assert read_yaml(path, SFTConfig, "sft") == {"seed": 2, "max_length": 64}
    assert read_yaml(path, DPOConfig, "dpo") == {"seed": 1, "max_length": 64, "beta": 0.3}
    assert read_yaml(path, RewardConfig, "reward") == {"seed": 1, "max_length": 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leaning_rate: 1", "unknown key 'leaning_rate'; did you mean 'learning_rate'?"),
        ("beta: 1", "unknown key 'beta'"),
        ("1: 2", "unknown key 1"),
        ("sft: {leaning_rate: 1}\ndpo:", "run.yaml, sft: unknown key 'leaning_rate'; did you mean 'learning_rate'?"),
        ("sft: {}\nrewad: {}", "unknown section 'rewad'; did you mean 'reward'?"),
        ("sft: {}\nlearning_rate: 1", "unknown section 'learning_rate'"),
        ("dpo: {}\nreward: {}", "no section 'sft'; it has dpo, reward"),
        ("sft: 3", "section 'sft' must be a mapping of keys to values"),
        ("shared: [1]\nsft: {}", "section 'shared' must be a mapping of keys to values"),
        ("- 1", "must be a mapping of keys to values"),
        ("a: [", "not valid YAML"),
        ("run_name: $NO_SUCH_NAME_HERE", "run_name: '$NO_SUCH_NAME_HERE' names an environment variable"),
        ("report_to: [$NO_SUCH_NAME_HERE]", "report_to: '$NO_SUCH_NAME_HERE' names"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_error(write, text, message):
    path = write(text)
    with pytest.raises(ValueError, match=r"run.yaml") as caught:
        read_yaml(path, SFTConfig, "sft")
    assert message in str(caught.value)


def test_a_section_may_name_those_that_run_before_it(write):
    path = write("shared: {seed: 1}\nsft:\ndpo: {beta: 1}\nrto: {run_first: [dpo, sft], seed: 2}\neval:\n")
    assert run_first(path, "rto") == ["dpo", "sft"]
    assert run_first(path, "dpo") == []
    assert read_yaml(path, RTOConfig, "rto") == {"seed": 2}
    assert run_first(write("seed: 1"), "rto") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rto: {run_first: [sft, dpo]}\ndpo:", "run_first: 'sft' is not another training section; the file has dpo"),
        ("rto: {run_first: [rto]}\ndpo:", "run_first: 'rto' is not another training section"),
        ("rto: {run_first: [eval]}\neval:", "run_first: 'eval' is not another training section"),
        ("rto: {run_first: dpo}\ndpo:", "run_first: must be a list of sections, as [sft, reward]; got 'dpo'"),
    ],
)
def test_invalid_run_first_values_are_refused(write, text, message):
    path = write(text)
    with pytest.raises(ValueError, match=r"run.yaml: run_first") as caught:
        run_first(path, "rto")
    assert message in str(caught.value)


def test_run_first_is_only_allowed_in_sections_of_commands(write):
    for text in ("run_first: [sft]", "shared: {run_first: [sft]}\nsft:\nrto:"):
        with pytest.raises(ValueError, match="unknown key 'run_first'"):
            read_yaml(write(text), RTOConfig, "rto")


def test_a_folder_is_named_by_its_path_or_a_path_in_it_but_not_by_output_dir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in ("runs/dpo", "./runs/dpo/", f"{tmp_path}/runs/dpo", "runs/dpo/value_model", ["a", "runs/dpo"]):
        assert names_folder([{"seed": 1}, {"dpo_model_path": value}], "runs/dpo"), value
    for value in ("runs/dpo2", "runs", "dpo", "", None, 3):
        assert not names_folder([{"dpo_model_path": value, "output_dir": "runs/dpo"}], "runs/dpo"), value


def test_a_shared_key_may_be_unread_in_some_sections(write):
    shared = "shared: {use_peft: true, lora_r: 64, use_rslora: true, seed: 3}\n"
    path = write(f"{shared}sft: {{use_peft: false}}\ndpo: {{}}\nreward: {{use_peft: false, lora_r: 8}}\n")
    sft, dpo = parse(SFTConfig, ["--config", path], "sft"), parse(DPOConfig, ["--config", path], "dpo")
    assert (sft.use_peft, sft.lora_r, sft.use_rslora, sft.seed) == (False, 16, False, 3)
    assert (dpo.use_peft, dpo.lora_r, dpo.use_rslora) == (True, 64, True)
    for kind, command, flags in ((RewardConfig, "reward", []), (SFTConfig, "sft", ["--lora_r", "8"])):
        with pytest.raises(
            ValueError, match=r"^lora_r: must be 16 when use_peft is false, since it would have no effect"
        ):
            parse(kind, ["--config", path, *flags], command)
    with pytest.raises(ValueError, match=r"^lora_r: must be at least 1; got 0"):
        parse(SFTConfig, ["--config", write("shared: {use_peft: true, lora_r: 0}\nsft:\n")], "sft")


def test_an_empty_file_gives_nothing(write):
    assert read_yaml(write(""), SFTConfig, "sft") == {}


def test_a_file_that_is_not_there_is_an_error_that_lists_the_recipes():
    with pytest.raises(ValueError, match=r"^config: no file 'nowhere'; the recipes are .*drpo_tldr"):
        read_yaml("nowhere", SFTConfig, "sft")


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"run_name: \xff\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(str(tmp_path / "run.yaml"), SFTConfig, "sft")


def test_environment_variables_and_the_home_folder_are_filled_in_but_not_in_a_template(write, monkeypatch):
    monkeypatch.setenv("PLACE", "/data")
    monkeypatch.setenv("HOME", "/home/someone")
    text = "dataset_name: $PLACE/${PLACE}.jsonl\noutput_dir: ~/run\nmodels: [~/a, $PLACE/b]\nchat_template: '~ $PLACE'"
    assert read_yaml(write(text), EvalConfig, "eval") == {
        "dataset_name": "/data//data.jsonl",
        "output_dir": "/home/someone/run",
        "models": ["/home/someone/a", "/data/b"],
        "chat_template": "~ $PLACE",
    }


@pytest.mark.parametrize("command", CONFIGS)
def test_a_resolved_configuration_reads_back_as_the_same_run(tmp_path, command):
    others = {"merge": {"dtype": "bfloat16"}, "cache": {"clear": ("all",)}}
    config = CONFIGS[command](**others.get(command, {"seed": 5}))
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert parse(CONFIGS[command], ["--config", str(tmp_path / "config.yaml")], command) == config


def test_awkward_values_are_read_back_unchanged(tmp_path):
    config = PPOConfig(
        run_name='it\'s: a "run", # 1\n',
        chat_template="{% for m in messages %}\n$m --x {{ m.content }}{% endfor %}",
        model_config=json.dumps({"model_type": "llama", "rope": {"theta": 1e4}}),
        report_to=("tensorboard", "wandb"),
        missing_eos_score=-1.0,
        value_learning_rate=1e-5,
        progress=False,
        adam_epsilon=1e-12,
    )
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert parse(PPOConfig, ["--config", str(tmp_path / "config.yaml")], "ppo") == config


def test_the_written_file_holds_every_field(tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(DRPOConfig()))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    fields = asdict(DRPOConfig())
    assert written == {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    assert list(written) == list(asdict(DRPOConfig()))


def test_flags_give_the_same_configuration_as_values():
    assert as_flags({"a": 1, "b": True, "c": None, "d": ["x", "y"], "e": {"k": [1]}, "f": ""}) == [
        *("--a", "1", "--b", "True", "--c", "None", "--d", "x", "y", "--e", '{"k": [1]}', "--f", "")
    ]


def test_unknown_flags_are_refused_with_the_nearest_name():
    check_flags(["--learning_rate", "1e-4", "--max-steps=3", "-1", "--help"], SFTConfig, "sft")
    with pytest.raises(ValueError, match=r"^unknown key --leaning-rate; did you mean 'learning_rate'\?$"):
        check_flags(["--seed", "1", "--leaning-rate=1"], SFTConfig, "sft")


def test_other_spellings_are_accepted_if_the_key_exists(write):
    path = write("num_generations: 2\nmax_completion_length: 7\n")
    config = parse(PPOConfig, ["--config", path, "--reset-group-size=4", "--gradient_checkpointing", "true"], "ppo")
    assert (config.num_generations, config.response_length, config.activation_checkpointing) == (4, 7, True)
    with pytest.raises(ValueError, match=r"^unknown key --reset_group_size$"):
        parse(SFTConfig, ["--reset_group_size", "4"], "sft")


def test_two_names_of_one_key_in_one_file_are_refused(write):
    told = r"'response_length' and 'max_completion_length' are two names of the key response_length; give one of them$"
    with pytest.raises(ValueError, match="^" + told):
        parse(PPOConfig, ["--response-length", "4", "--max_completion_length=7"], "ppo")
    path = write("response_length: 4\nmax_completion_length: 7\n")
    with pytest.raises(ValueError, match=f"^{path}: {told}"):
        parse(PPOConfig, ["--config", path], "ppo")
    path = write("shared:\n  response_length: 4\nppo:\n  max_completion_length: 7\n")
    assert parse(PPOConfig, ["--config", path], "ppo").response_length == 7
    assert parse(PPOConfig, ["--config", path, "--response_length", "5"], "ppo").response_length == 5


def test_a_blank_or_null_key_is_absent_unless_null_is_a_value_of_it(write):
    path = write(
        "shared: {seed: 3}\nsft:\n  eos_token:\n  seed: null\n  report_to: ~\ndrpo: {missing_eos_score: null}\n"
    )
    assert read_yaml(path, SFTConfig, "sft") == {"seed": 3}
    assert parse(SFTConfig, ["--config", path], "sft") == SFTConfig(seed=3)
    assert parse(DRPOConfig, ["--config", path], "drpo").missing_eos_score is None


@pytest.mark.parametrize(
    "text", ["12:30", "2026-11-30", "2026-11-30 12:30:00", "007", "1.10", "1e6", "0x10", "1_000", "yes", "off", "True"]
)
def test_a_key_that_takes_text_gets_the_characters_of_the_file(write, tmp_path, text):
    path = write(f"run_name: {text}\nreport_to: [{text}]\n")
    config = parse(SFTConfig, ["--config", path], "sft")
    assert (config.run_name, config.report_to) == (text, (text,))
    (tmp_path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert parse(SFTConfig, ["--config", str(tmp_path / "config.yaml")], "sft") == config


def test_numbers_are_read_as_written_and_quoted_ones_too(write):
    path = write("seed: '12'\nlearning_rate: \"1e-4\"\nmax_steps: 007\nadam_epsilon: 1e-9\nwarmup_steps: 1_000\n")
    config = parse(SFTConfig, ["--config", path], "sft")
    assert (config.seed, config.learning_rate, config.max_steps) == (12, 1e-4, 7)
    assert (config.adam_epsilon, config.warmup_steps) == (1e-9, 1000)
    with pytest.raises(ValueError, match=r"--seed.*12:30"):
        parse(SFTConfig, ["--config", write("seed: 12:30")], "sft")


def test_values_inside_a_mapping_keep_their_types(write):
    path = write("chat_template_kwargs: {day: 2026-11-30, at: 12:30, theta: 1e6, n: 3, x: .5, ok: true, none: null}")
    written = parse(SFTConfig, ["--config", path], "sft").chat_template_kwargs
    expected = {"day": "2026-11-30", "at": "12:30", "theta": 1e6, "n": 3, "x": 0.5, "ok": True, "none": None}
    assert json.loads(written) == expected


def test_a_dataset_is_one_name_or_several(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    files = ("a b.jsonl", "/home/someone/b,c.jsonl")
    text = "dataset_name: [a b.jsonl, '~/b,c.jsonl']"
    assert parse(SFTConfig, ["--config", write(text)], "sft").dataset_name == files
    flags = parse(SFTConfig, ["--dataset_name", "a b.jsonl", "~/b,c.jsonl", "--seed", "1"], "sft")
    assert flags.dataset_name == files
    assert parse(SFTConfig, ["--config", write(as_yaml(flags))], "sft") == flags
    assert parse(SFTConfig, ["--config", write("dataset_name: 007")], "sft").dataset_name == "007"
    assert SFTConfig(dataset_name=[Path("a"), "b"]).dataset_name == ("a", "b")


def test_a_blank_item_of_a_list_is_refused(write):
    with pytest.raises(ValueError, match=r"run.yaml: report_to: item 2 of the list is blank"):
        read_yaml(write("report_to:\n- wandb\n-\n"), SFTConfig, "sft")


def test_a_file_in_the_home_folder_is_found(write, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(write("seed: 3")).parent))
    assert parse(SFTConfig, ["--config=~/run.yaml"], "sft").seed == 3


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_section_of_every_recipe_is_a_valid_configuration(recipe, monkeypatch):
    monkeypatch.setenv("FASTRLHF_DATA", "/data")
    sections = set(yaml.safe_load(recipe.read_text())) & COMMANDS
    assert sections
    for command in sections:
        config = parse(CONFIGS[command], ["--config", recipe.stem], command)
        assert config == parse(CONFIGS[command], ["--config", str(recipe)], command)
        assert set(run_first(recipe.stem, command)) <= sections


@pytest.mark.parametrize("how", ["file", "flag", "flag with ="])
def test_a_key_is_understood_by_the_name_it_had_elsewhere(write, how):
    arguments = {
        "file": ["--config", write("gradient_checkpointing: true")],
        "flag": ["--gradient_checkpointing", "True"],
        "flag with =": ["--gradient-checkpointing=True"],
    }[how]
    assert parse(SFTConfig, arguments, "sft").activation_checkpointing


@pytest.mark.parametrize(
    "flags",
    [["--use_peft", "true"], ["--use-peft=YES"], ["--use_peft", "1"], ["--use_peft"], ["--use_peft", "--lora_r", "4"]],
)
def test_truth_values_are_understood_as_people_write_them(flags):
    assert parse(SFTConfig, flags, "sft").use_peft is True


def test_false_values_are_understood_and_other_words_refused(write):
    assert parse(SFTConfig, ["--progress", "no", "--seed", "4"], "sft").progress is False
    assert parse(SFTConfig, ["--config", write('progress: "off"')], "sft").progress is False
    assert parse(SFTConfig, ["--run_name", "true"], "sft").run_name == "true"
    with pytest.raises(ValueError, match="progress"):
        parse(SFTConfig, ["--progress", "maybe"], "sft")


def test_an_error_names_file_and_section_unless_the_value_came_from_a_flag(write):
    path = write("sft:\n  max_steps: three\ndpo:\n  beta: 0.1\n")
    with pytest.raises(ValueError, match=rf"^{path}, sft: .*--max_steps.*three"):
        parse(SFTConfig, ["--config", path], "sft")
    with pytest.raises(ValueError, match=r"^(?!/).*--beta.*high"):
        parse(DPOConfig, ["--config", path, "--beta", "high"], "dpo")


@pytest.mark.parametrize("text", ["sft:\n  seed: 1\nsft:\n  seed: 2\n", "sft:\n  seed: 1\n\n  seed: 2\n"])
def test_a_duplicate_key_is_refused_with_its_lines(write, text):
    with pytest.raises(ValueError, match=r"'(sft|seed)' occurs more than once, in lines (1 and 3|2 and 4)"):
        read_yaml(write(text), SFTConfig, "sft")
