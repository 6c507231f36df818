"""Tests which libraries a command imports. The help page must import no large library, and training on a JSONL file
neither datasets nor the libraries that datasets imports."""

import json
import pkgutil
import subprocess
import sys

import pytest

from fastrlhf import algorithms
from tests import tiny

SLOW = ("datasets", "pandas", "pyarrow")

IMPORTS = """\
import importlib, json, sys

# These libraries are needed in any case; what they import by themselves is not counted.
import accelerate, peft
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

slow = {slow} - sys.modules.keys()
for module in {modules}:
    importlib.import_module(f"fastrlhf.algorithms.{{module}}")
    print(f"{{module}} imports {{sorted(slow & sys.modules.keys())}}")

from fastrlhf.cli import main

for command, *settings in {commands}:
    assert main([command, *settings]) == 0
    print(f"{{command}} imports {{sorted(slow & sys.modules.keys())}}")
print(f"checked: {{sorted(slow)}}")
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """The output lines of a process that imports all modules of fastrlhf.algorithms and then trains on a JSONL file."""
    folder = tmp_path_factory.mktemp("start_up")
    model, rows = tiny.save_policy(folder / "model"), folder / "rows.jsonl"
    row = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
    rows.write_text(f"{json.dumps(row)}\n" * 4)
    common = ["--model_name_or_path", model, "--dataset_name", str(rows), "--max_steps", "1", "--device", "cpu"]
    common += ["--per_device_train_batch_size", "2", "--dataset_cache_dir", str(folder / "tokens")]
    commands = [
        ["sft", *common, "--output_dir", str(folder / "sft"), "--response", "chosen"],
        ["dpo", *common, "--output_dir", str(folder / "dpo")],
    ]
    program = IMPORTS.format(slow=set(SLOW), modules=modules(), commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(algorithms.__path__)]


@pytest.mark.parametrize("module", modules())
def test_importing_an_algorithm_imports_no_library_for_arrow_files(lines, module):
    assert f"{module} imports []" in lines


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_on_a_jsonl_file_imports_no_library_for_arrow_files(lines, command):
    assert f"{command} imports []" in lines


def test_the_other_libraries_import_none_of_them_either(lines):
    # If a release of transformers, accelerate or peft imports such a library, the tests above cannot tell whether
    # fastrlhf imports it.
    assert lines[-1] == f"checked: {sorted(SLOW)}"


def test_the_help_page_of_a_command_imports_neither_torch_nor_transformers():
    large = {"torch", "transformers", "numpy", *SLOW}
    program = "import sys\nfrom fastrlhf.cli import main\nassert main(['dpo', '--help']) == 0\n"
    program += f"print(sorted({large} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
