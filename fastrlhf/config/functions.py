"""Loads user-defined functions by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrlhf.config.paths import as_given


def load_function(name: str, field: str) -> Callable[..., Any]:
    """Loads the function named "package.module:function" or "path/to/file.py:function".

    Raises ValueError, naming `field`, if the function does not exist or its module imports something that is missing.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{field}: {name!r} must look like package.module:function or path/to/file.py:function")
    try:
        module = _run_file(place, field) if place.endswith(".py") else import_module(place)
    except ImportError as error:
        raise ValueError(f"{field}: {place!r} cannot be imported: {error}; install it or correct the name") from error
    except SystemExit as error:
        raise ValueError(f"{field}: {place!r} calls sys.exit({error.code!r}) when it is imported") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{field}: {place!r} has no function {attribute!r}")
    return function


def function_hashes(config: Any) -> dict[str, str]:
    """Maps the name of every user-defined function in a configuration to the SHA-256 of its file. Checkpoints store the
    hashes, so that a run does not silently continue with another reward function. Modules that the file imports are not
    hashed."""
    used, given = _names(asdict(config)), _names(as_given(config))
    found = {name: _source(place.rpartition(":")[0]) for name, place in zip(given, used, strict=True)}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path is not None}


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
