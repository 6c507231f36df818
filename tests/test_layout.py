"""Tests of the repository's structure: import layers, one test file per module, dependencies, contents of the wheel."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import fastrlhf

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = {"fastrlhf": ROOT, "fastrlhf_kernels": ROOT / "kernels"}
MODULES = {  # path in the repository -> dotted name; `package.__init__` is `package`
    path.relative_to(ROOT).as_posix(): ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    for package, base in SOURCE_ROOTS.items()
    for path in sorted((base / package).rglob("*.py"))
}
OTHER_SOURCES = [
    path.relative_to(ROOT).as_posix()
    for top in ("bench", "tests", "docs", "examples")
    for path in (ROOT / top).rglob("*.py")
]

LAYERS = (  # lowest first: a module may import from its own layer and from layers earlier in this list
    ("__version__", "types", "config", "distributed"),
    ("data", "models"),
    ("publish",),
    ("runtime",),
    ("rollout", "report"),
    ("rewards", "evaluation"),
    ("algorithms",),
    ("tools",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
MAX_FILES_AT_THE_ROOT = 5
PURE = ("fastrlhf.types", "fastrlhf.data.resets", "fastrlhf.data.packing", "fastrlhf.algorithms.advantages")
MAX_LINES = 400
NO_TEST_FILE = {
    "fastrlhf/config/commands.py": "its fields are tested with all others, in tests/config/test_checks.py",
    "fastrlhf/models/own_pace.py": "needs several processes, which tests/distributed/test_ranks.py starts once for all",
    "fastrlhf/models/parts.py": "needs several processes, which tests/distributed/test_ranks.py starts once for all",
    "fastrlhf/models/sharding.py": "needs several processes, which tests/distributed/test_ranks.py starts once for all",
    "fastrlhf/runtime/result.py": "declares data, which the tests of every trainer read",
    "fastrlhf/types.py": "declares data; `pack` and the trainers give it its meaning and are tested",
}
DISTRIBUTIONS = {"yaml": "pyyaml"}  # import name -> distribution name, if they differ


def imports_of(path: str) -> set[str]:
    """Returns the dotted names that a file imports anywhere, including the imported symbol, such as
    `fastrlhf.types.Segment`."""
    package = MODULES[path].split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            source = [*parent, *(node.module.split(".") if node.module else [])]
            names |= {".".join([*source, alias.name]) for alias in node.names}
    return names


def third_party(path: str) -> set[str]:
    roots = {name.split(".")[0] for name in imports_of(path)}
    return roots - sys.stdlib_module_names - set(SOURCE_ROOTS)


def layer_of(name: str) -> int:
    """Returns the index in LAYERS of a dotted name within fastrlhf: the layer of the longest listed prefix."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for index, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return index
    pytest.fail(f"{name} is in no layer of tests/test_layout.py: give it one")


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def modules_of(package: str) -> list[str]:
    return [path for path, name in MODULES.items() if name.split(".")[0] == package]


def test_a_layer_never_imports_a_higher_one():
    for path in modules_of("fastrlhf"):
        if path == "fastrlhf/__init__.py":
            continue  # fastrlhf/__init__.py re-exports names of every layer lazily
        own = layer_of(MODULES[path])
        for name in imports_of(path):
            if name.split(".")[0] == "fastrlhf":
                assert layer_of(name) <= own, f"{path} imports {name}, which is above it"


def room_of(name: str) -> str:
    """Returns the room of a module: its folder below fastrlhf, or the module itself if it is at the root."""
    return name.split(".")[1]


def test_no_two_rooms_import_each_other():
    arrows = {
        (room_of(MODULES[path]), room_of(name))
        for path in modules_of("fastrlhf")
        if path != "fastrlhf/__init__.py"
        for name in imports_of(path)
        if name.startswith("fastrlhf.")
    }
    order = TopologicalSorter[str]()
    for room, imported in arrows:
        if room != imported:
            order.add(room, imported)
    order.prepare()  # raises CycleError, which names the rooms (folders), if they import each other in a cycle


def test_the_root_holds_few_files():
    assert len(list((ROOT / "fastrlhf").glob("*.py"))) <= MAX_FILES_AT_THE_ROOT


def test_the_trainer_imports_neither_bench_nor_tests():
    for path in modules_of("fastrlhf"):
        assert not third_party(path) & {"bench", "tests", "kernels"}, path


def test_the_kernels_import_torch_triton_and_numpy_only():
    for path in modules_of("fastrlhf_kernels"):
        roots = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
        assert roots <= {"torch", "triton", "numpy", "fastrlhf_kernels"}, path


def test_pure_files_import_no_model_and_no_tokenizer():
    for path in (path for path, name in MODULES.items() if name in PURE):
        assert third_party(path) <= {"torch", "numpy"}, path


def test_every_third_party_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {re.split(r"[\[<>=~;\s]", requirement)[0] for requirement in requirements}
    for path in MODULES:
        needed = {DISTRIBUTIONS.get(root, root.replace("_", "-")) for root in third_party(path)}
        assert needed <= declared, f"{path} needs {needed - declared}"


def test_the_base_install_imports_the_kernels_and_the_pure_files():
    blocked = ["datasets", "jinja2", "peft", "safetensors", "tokenizers", "tqdm", "transformers", "tyro", "yaml"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "import fastrlhf; assert 'torch' not in sys.modules\n"
        f"import fastrlhf_kernels, {', '.join(PURE)}"
    )
    path = [str(base) for base in SOURCE_ROOTS.values()]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{program}"], check=True, timeout=120)


def test_every_top_level_export_exists():
    for name, module in fastrlhf._EXPORTS.items():
        assert getattr(fastrlhf, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        fastrlhf.missing  # noqa: B018


def test_the_kernels_folder_is_not_a_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_each_module_has_its_test_file():
    missing = []
    for path, name in MODULES.items():
        if path.endswith("/__init__.py"):
            continue  # only re-exports
        package, *folders, module = name.split(".")
        folder = Path("tests", *(["kernels"] if package == "fastrlhf_kernels" else []), *folders)
        twin = folder / f"test_{module.lstrip('_')}.py"
        if path not in NO_TEST_FILE and not (ROOT / twin).exists():
            missing.append(f"{path}: {twin}")
    assert not missing


def test_the_exceptions_still_exist():
    assert set(NO_TEST_FILE) <= set(MODULES)


@pytest.mark.parametrize("path", sorted([*MODULES, *OTHER_SOURCES]))
def test_sources_are_ascii_and_of_readable_length(path: str):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]
    num_lines = len(text.splitlines())
    assert num_lines <= MAX_LINES


def test_the_contributors_guide_maps_exactly_the_modules():
    """Reads the first fenced block under the heading, which has one path per line, followed by its purpose."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, heading, rest = guide.partition("\n## Map of the files\n")
    assert heading, "CONTRIBUTING.md has no heading '## Map of the files'"
    block = re.split(r"^```.*$", rest, maxsplit=2, flags=re.MULTILINE)[1]
    listed = [line.split()[0] for line in block.splitlines() if line.strip()]
    assert len(listed) == len(set(listed)), "a path is listed twice"
    for path in listed:
        assert any(ROOT.glob(path)), f"{path} does not exist"
    packages = tuple(base.relative_to(ROOT).joinpath(p).as_posix() + "/" for p, base in SOURCE_ROOTS.items())
    listed_modules = {path for path in listed if path.startswith(packages) and path.endswith(".py")}
    modules = {path for path in MODULES if not path.endswith("/__init__.py")}
    assert listed_modules - {path for path in MODULES if path.endswith("/__init__.py")} == modules


def test_recipes_named_in_the_readme_exist():
    for name in re.findall(r"recipes/([\w.-]+\.yaml)", readme()):
        assert (ROOT / "fastrlhf" / "recipes" / name).exists(), name


def test_the_wheel_holds_the_two_packages_and_the_recipes(tmp_path: Path):
    """Hatchling leaves out files that .gitignore names, so this test also fails if .gitignore matches a source
    folder."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    typed = {f"{package}/py.typed" for package in SOURCE_ROOTS}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastrlhf" / "recipes").glob("*.yaml")}
    assert shipped == {path.removeprefix("kernels/") for path in MODULES} | recipes | typed
