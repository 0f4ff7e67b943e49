"""Config files and overrides to one plain tree, which ``config.py`` validates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aptp_ray.section import ConfigError


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file over its bases, and applies ``key.sub=value`` overrides.

    Raises:
        ConfigError: see ``config.load_config``.
    """
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    return tree


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tree, over that of its base."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base, by way of {', '.join(file.name for file in seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no text file ({error.reason} at byte {error.start}): name a YAML file in UTF-8, e.g. one of jobs/configs"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a config is a mapping of sections")
    base = tree.pop("base", None)
    return tree if base is None else _merged(_read(path.parent / str(base), (*seen, path.resolve())), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    if above.get("kind", below.get("kind")) != below.get("kind"):
        return above  # another kind of section has other keys
    both = {key: value for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return below | above | {key: _merged(below[key], value) for key, value in both.items()}


def _problem(error: yaml.YAMLError) -> str:
    """What YAML says is wrong and where, without the line itself, which may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value, e.g. prune.budget=0.5")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}=...: {parent} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}=...: the value is not YAML: {_problem(error)}") from error
