"""Checks the README and the manual against the code: every command, file and link in them must exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import statistics
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml

from bench.__main__ import make_parser
from fastrlhf.cli import COMMANDS, TRAINER_CONFIGS
from fastrlhf.config import CONFIGS, elsewhere
from fastrlhf.config.command_line import parse, parse_for_tool
from fastrlhf.config.compare import SAME_MODEL
from fastrlhf.config.help import keys_of
from tests import tiny

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")),
        *(path for path in DOCS.rglob("*.md") if "generated" not in path.parts),
    ]
)
MAX_WORDS = 1500
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LANGUAGES = {"bash", "yaml", "python", "json", "text", "{include}", "{toctree}"}
SHELL = {"cd", "curl", "export", "git", "hf", "lm_eval", "sbatch"}
"""Shell commands in code blocks that the tests accept without a check."""


class Block(NamedTuple):
    page: Path
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(page, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def place(item: Path | Block) -> str:
    page = item.page if isinstance(item, Block) else item
    return page.relative_to(ROOT).as_posix()


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell block, without comments; continued lines are joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def file_name(block: Block) -> str | None:
    """The file name in the first line of a YAML block: `# drpo.yaml`, possibly followed by more words."""
    match = re.match(r"# ([\w-]+\.yaml)", block.text)
    return match[1] if match else None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that contains `examples`, as a clone does."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(page: Path, folder: Path) -> None:
    """Writes the named YAML blocks of a page as files."""
    for block in blocks(page):
        if block.language == "yaml" and (name := file_name(block)):
            (folder / name).write_text(block.text)


def check_fastrlhf(words: list[str]) -> None:
    """Raises the errors that the command line raises for the given words before it opens files or models."""
    command, arguments = words[0], words[1:]
    if command.startswith("--"):
        assert words in (["--help"], ["--version"]), words
        return
    assert command in COMMANDS, command
    if "--help" in arguments:
        return
    if command in CONFIGS:
        parse(CONFIGS[command], arguments, command)
    elif command in ("inspect", "plan"):
        parse_for_tool(arguments, TRAINER_CONFIGS, {"inspect": ("num", "html"), "plan": ("memory_gib",)}[command])
    else:
        assert command in ("report", "doctor"), command
        assert not any(word.startswith("--") for word in arguments), words


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"\w+=\S*", words[0]):  # assignments of environment variables
        words = words[1:]
    match words:
        case ["fastrlhf", *rest] | ["python", "-m", "fastrlhf", *rest]:
            check_fastrlhf(rest)
        case ["torchrun", *rest]:
            where = rest.index("fastrlhf")
            assert rest[where - 1] == "-m"
            check_fastrlhf(rest[where + 1 :])
        case ["make", *rest]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets), words
        case ["python", "-m", "bench", *rest]:
            make_parser().parse_args(rest)
        case ["python", "-m", "pytest", *rest]:
            assert all((ROOT / path).exists() for path in rest if not path.startswith("-")), words
        case ["python", "-m", "vllm.entrypoints.openai.api_server", *_]:
            pass  # another project's program
        case ["python", script, *_]:
            assert (ROOT / script).exists(), words
        case ["sbatch", *rest] if any(word.endswith(".sbatch") for word in rest):
            where = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
            assert (ROOT / rest[where]).exists(), words
            check_fastrlhf(rest[where + 1 :])
        case ["docker", "run", *rest]:
            check_fastrlhf(rest[rest.index("fastrlhf") + 1 :])
        case ["docker", "build", *rest]:
            assert (ROOT / rest[rest.index("-f") + 1]).exists(), words
        case ["bash", script, *_]:
            assert (ROOT / script).exists(), words
        case ["pip", "install", *rest]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = [name for word in rest for name in re.findall(r"\[(.*)\]", word) for name in name.split(",")]
            assert set(asked) <= set(extras), words
        case _:
            assert words[0] in SHELL, f"{words}: teach tests/test_docs.py how to check it"


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_every_command_line_parses(page: Path, folder: Path):
    write_files(page, folder)
    for block in blocks(page):
        if block.language == "bash":
            for words in command_lines(block.text):
                check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_every_code_block_names_its_language(page: Path):
    assert {block.language for block in blocks(page)} <= LANGUAGES


def check_yaml(block: Block) -> None:
    """Raises the error of the first invalid section of a YAML block. A block without sections is the configuration of
    one command; the name of its file begins with the command.
    """
    name = file_name(block)
    sections = yaml.safe_load(block.text)
    assert name, f"{place(block)}: begin the block with a comment that names the file"
    own = [section for section in sections if section in CONFIGS]
    for command in own or [Path(name).stem.split("_")[0]]:
        parse(CONFIGS[command], ["--config", name], command)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=place)
def test_every_yaml_block_is_a_configuration(block: Block, folder: Path):
    write_files(block.page, folder)
    check_yaml(block)


def test_every_json_block_parses():
    for block in all_blocks("json"):
        for line in block.text.splitlines():
            json.loads(line)


def test_every_python_block_compiles():
    for block in all_blocks("python"):
        ast.parse(block.text)


RUN_PAGES = [
    page
    for page in PAGES
    if any(block.language == "python" for block in blocks(page)) and page != ROOT / "kernels/README.md"
]
"""Pages whose Python blocks run. The examples of kernels/README.md run in tests/kernels/test_readme.py."""


@pytest.mark.parametrize("page", RUN_PAGES, ids=place)
def test_the_python_blocks_run(page: Path, folder: Path):
    """Runs all blocks of a page one after another; runs/sft, runs/reward and runs/dpo are tiny models."""
    (folder / "runs").mkdir()
    tiny.save_policy(folder / "runs/sft")
    tiny.save_policy(folder / "runs/dpo", seed=1)
    tiny.save_reward_model(folder / "runs/reward")
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, place(block), "exec"), names)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub and MyST create for the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_every_link_has_a_target(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "generated" in target.parts:
            assert target.name in generated().PAGES, f"{place(page)}: {link}"
            continue
        assert target.exists(), f"{place(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{place(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_every_file_that_is_named_exists(page: Path):
    for path in re.findall(r"`((?:tests|bench|examples|fastrlhf|kernels|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{place(page)}: {path}"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().split()) <= MAX_WORDS


def test_the_demo_table_of_the_readme_is_made_of_the_rows():
    """Recomputes the table from bench/results: means over five seeds; two columns also have Student's t intervals."""
    rows = [json.loads(line) for line in (ROOT / "bench/results/cpu-x86_64.jsonl").read_text().splitlines()]
    table = (ROOT / "README.md").read_text()
    for method, shown in (("sft", "SFT"), ("dpo", "DPO"), ("ppo", "PPO"), ("drpo", "DR-PO")):
        own = [row for row in rows if row["bench"] == "toy" and row["method"] == method]
        assert [row["seed"] for row in own] == [0, 1, 2, 3, 4]
        cells = {name: mean_and_interval([row[name] for row in own]) for name in ("win_rate", "gold_reward")}
        (win, win_error), (gold, gold_error) = cells["win_rate"], cells["gold_reward"]
        kl, seconds = (mean_and_interval([row[name] for row in own])[0] for name in ("kl", "seconds"))
        line = (
            f"| {100 * win:.1f} +- {100 * win_error:.1f} | {gold:.2f} +- {gold_error:.2f} | {kl:.2f} | {seconds:.0f} |"
        )
        assert f"| {shown} {line}" in table


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean of five values and half the width of its 95 % interval."""
    return statistics.mean(values), 2.7764 * statistics.stdev(values) / 5**0.5


@cache
def generated() -> ModuleType:
    """Imports docs/generate.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # needed by dataclasses, which look up annotations in sys.modules
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_key_with_its_default_and_help():
    page = generated().configuration()
    for kind in CONFIGS.values():
        for key in keys_of(kind).values():
            assert f"`{key.name}`\n: {key.help}\n\n  *{key.type}*; default " in page, key.name
    wanted = "default `8`, `64` for ppo, `64` for grpo, `64` for drpo, `64` for rto. Read by all trainers."
    assert wanted in page.partition("\n`per_device_train_batch_size`\n")[2].split("\n\n")[1]


def test_the_table_for_trl_users_has_every_key():
    page = generated().trl_keys()
    for key in elsewhere.KEYS:
        assert f"| `{key.name}` | {key.status} | " in page
    assert "| `packing` | always on |" in page
    assert "| `epsilon` | other name | `cliprange` |" in page


def test_the_keys_that_may_change_on_resume_are_those_of_the_comparison():
    text = (DOCS / "resume.md").read_text(encoding="utf-8")
    assert [key for key in SAME_MODEL if f"`{key}`" not in text] == []


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for block in blocks(DOCS / "index.md"):
        if block.language == "{toctree}":
            listed |= {line.strip() for line in block.text.splitlines() if line.strip() and not line.startswith(":")}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES if DOCS in page.parents} - {"index"}
    assert listed == pages | {f"generated/{Path(name).stem}" for name in generated().PAGES if name.endswith(".md")}


def test_the_citation_file_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    papers = {reference["title"]: reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert sorted(papers.values()) == ["arXiv:2310.12036", "arXiv:2403.19279", "arXiv:2404.08495", "arXiv:2404.18922"]
