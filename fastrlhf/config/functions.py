"""Loads user-defined functions by name."""

from __future__ import annotations

import ast
import logging
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from fastrlhf.config.paths import as_given

log = logging.getLogger(__name__)


class FunctionFailed(RuntimeError):
    """Raised if a user-defined function raises an error; its message names the function and the error."""


_FILES: set[str] = set()
"""Files of the functions loaded so far."""

_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_INSTALLED += [Path(__file__).parent.parent]
"""The folders of modules that a change of the user does not reach."""


def load_function(name: str, field: str, kind: str = "function") -> Callable[..., Any]:
    """Loads the function named "package.module:function" or "path/to/file.py:function"; `kind` is "class" for a class.

    Raises ValueError, naming `field`, if the function does not exist or its module imports something that is missing.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{field}: {name!r} must look like package.module:{kind} or path/to/file.py:{kind}")
    try:
        if place.endswith(".py"):
            _FILES.add(str(Path(place).expanduser().resolve()))
        module = _run_file(place, field) if place.endswith(".py") else import_module(place)
    except SyntaxError as error:
        raise ValueError(f"{field}: {place!r} is not valid Python: line {error.lineno}: {error.msg}") from error
    except ImportError as error:
        raise ValueError(f"{field}: {place!r} cannot be imported: {error}; install it or correct the name") from error
    except SystemExit as error:
        raise ValueError(f"{field}: {place!r} calls sys.exit({error.code!r}) when it is imported") from error
    _FILES.add(str(module.__file__))
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{field}: {place!r} has no {kind} {attribute!r}")
    return function


def function_hashes(config: Any) -> dict[str, str]:
    """Maps the name of every user-defined function in a configuration to the SHA-256 of its file. Checkpoints store the
    hashes, so that a run does not silently continue with another reward function. A module that the file imports has a
    separate entry, "helper of path/to/file.py:function", unless it belongs to an installed package."""
    used, given = _names(asdict(config)), _names(as_given(config))
    hashes = {}
    for name, place in zip(given, used, strict=True):
        if (path := _source(place.rpartition(":")[0])) is not None:
            hashes[name] = _digest(path)
            hashes |= {f"{module} of {name}": _digest(file) for module, file in _imported(path).items()}
    return hashes


def object_hashes(functions: Mapping[str, Any]) -> dict[str, str]:
    """Maps the names of functions that a program holds to the SHA-256 of their source text. For a callable object the
    source text of its class is hashed. Values that a function refers to are not hashed. A function without source text,
    for example from a compiled module, is left out, and this is logged."""
    hashes = {}
    for name, function in functions.items():
        function = getattr(function, "func", function)  # of a functools.partial
        plain = isinstance(function, type) or hasattr(function, "__code__")
        try:
            hashes[name] = sha256(getsource(function if plain else type(function)).encode()).hexdigest()
        except (OSError, TypeError):
            log.info("function %s has no source: a resumed run cannot tell whether it has changed", name)
    return hashes


def user_frames(error: BaseException) -> list[str]:
    """Describes the calls in files of user-defined functions that led to an error: at most five, innermost last. Empty
    if the error does not come from these files."""
    frames = []
    cause: BaseException | None = error
    while cause is not None:
        frames += [frame for frame in extract_tb(cause.__traceback__) if frame.filename in _FILES]
        cause = cause.__cause__
    return [f"{frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-5:]]


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _imported(path: Path, found: dict[str, Path] | None = None) -> dict[str, Path]:
    """Maps the modules that a file imports, directly or not, to their files, except installed ones."""
    found = {} if found is None else found
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and name not in found and not any(Path(file).is_relative_to(place) for place in _INSTALLED):
                found[name] = Path(file)
                if file.endswith(".py"):
                    _imported(found[name], found)
    return found


def _names(values: Mapping[str, Any]) -> list[str]:
    items = [item for value in values.values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in items if isinstance(item, str) and ":" in item]


def _source(place: str) -> Path | None:
    """Returns the file of a module that was loaded by path or by name."""
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        return path if path.is_file() else None
    file = getattr(sys.modules.get(place), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _run_file(place: str, field: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{field}: no file {place!r}")
    # A unique module name, which no installed module and no file of the same name in another folder has.
    spec = spec_from_file_location(str(path.with_suffix("")).replace(".", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # The module is registered before it runs, because dataclasses look it up there to resolve string annotations.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
