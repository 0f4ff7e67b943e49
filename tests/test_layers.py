"""Who may import whom, held by walking every import of the package, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "aptp_ray"

SHELLS = {"data", "train", "evaluate", "serve", "demo", "hub", "plan"}
MIDDLE = {"artifacts", "tracking", "encoding", "growth"}  # what the shells meet through
BOTTOM = {"core", "config"}  # these do not know each other
# Files that are a part of their neighbor, and stand apart only to be short.
PART_OF = {
    **dict.fromkeys(("section", "sections", "data_sections", "serve_sections", "evaluate_sections"), "config"),
    **dict.fromkeys(("credentials", "config_files"), "config"),
    **dict.fromkeys(("storage", "reuse"), "artifacts"),
}
ORCHESTRATION = {"ray", "wandb"}
# SciPy comes with POT, which is built on it.
CORE_LIBRARIES = {"torch", "diffusers", "transformers", "ot", "numpy", "scipy", "safetensors", "PIL"}

PUBLIC_CORE = (
    "ArchitectureSpace",
    "GatedUNet",
    "MacsModel",
    "PromptRouter",
    "PrunedUNet2DConditionModel",
    "balanced_assignment",
    "count_macs",
    "prune_unet",
)
TOP_LEVEL = {"pyproject.toml", "aptp_ray", "clusters", "jobs", "tests", "README.md", "LICENSE", "NOTICE"}


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name -> file, of every module below ``root``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Yields the dotted name of everything that a module imports, wherever in the file the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: leave level - 1 packages, then go down
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            # "from aptp_ray import data" names the module data; "from aptp_ray.data.schema import KEY" names no module KEY,
            # and a name too many below a module changes no verdict.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """The part of the house that a dotted name of ours belongs to; "" for the package itself."""
    parts = name.split(".")
    return PART_OF.get(parts[1], parts[1]) if len(parts) > 1 else ""


def violation(importer: str, imported: str) -> str | None:
    """Says what is wrong with an import, or None."""
    here, library = room(importer), imported.split(".")[0]
    if library != "aptp_ray":
        if here in BOTTOM | {"", "hub", "plan"} and library in ORCHESTRATION:
            return f"{here or 'the package'} knows no {library}"
        if here == "core" and library not in CORE_LIBRARIES | set(sys.stdlib_module_names):
            return f"core takes no {library}"
        return None
    there = room(imported)
    if there == here or there == "":
        return None
    if importer == "aptp_ray.data.schema":
        return "data/schema.py imports nothing"
    if here == "":
        return "the package's __init__ imports no part of it"
    if here in BOTTOM:
        return f"{here} imports nothing else of ours"
    if here in MIDDLE and there not in BOTTOM:
        return f"{here} may import core and config only"
    if here in SHELLS and there in SHELLS and not (imported + ".").startswith("aptp_ray.data.schema."):
        return "shells meet through artifacts and data/schema.py"
    return None


def test_every_import_goes_downwards() -> None:
    found = modules()
    assert {room(name) for name in found} >= SHELLS | MIDDLE | BOTTOM, "a part of the house is gone: mend this test"
    wrong = [
        f"{name} imports {imported}: {problem}"
        for name, path in found.items()
        for imported in imports(name, path)
        if (problem := violation(name, imported))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_known_place() -> None:
    unknown = {room(name) for name in modules()} - SHELLS - MIDDLE - BOTTOM - {"", "__main__"}
    assert not unknown, f"say in this test which layer {unknown} belongs to"


def test_the_package_never_imports_the_jobs() -> None:
    jobs = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")} | {"jobs", "tests"}
    found = [(name, imported) for name, path in modules().items() for imported in imports(name, path)]
    assert not [pair for pair in found if pair[1].split(".")[0] in jobs]


def test_only_the_schema_is_shared_between_shells_and_it_imports_nothing() -> None:
    assert list(imports("aptp_ray.data.schema", PACKAGE / "data" / "schema.py")) in ([], ["__future__.annotations"])


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("aptp_ray.core.space", "import ray"),
        ("aptp_ray.core.space", "from ray.data import Dataset"),
        ("aptp_ray.core.space", "from ..config import Config"),
        ("aptp_ray.core.space", "import pandas"),
        ("aptp_ray.config", "from aptp_ray.core import space"),
        ("aptp_ray.config", "def f():\n    import wandb"),
        ("aptp_ray.artifacts", "from aptp_ray.data.schema import KEY"),
        ("aptp_ray.encoding", "from aptp_ray import train"),
        ("aptp_ray.train.loop", "def f():\n    from aptp_ray.data.encoded import read_encoded"),
        ("aptp_ray.train.loop", "from ..serve import app"),
        ("aptp_ray.hub.mixture", "import ray"),
        ("aptp_ray.plan.deploy", "import ray"),
        ("aptp_ray.plan.deploy", "from aptp_ray.serve.app import ServeArgs"),
        ("aptp_ray.serve.app", "import aptp_ray.data.schemata"),
        ("aptp_ray.data.schema", "from aptp_ray.config import Config"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, importer: str, statement: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(statement)
    assert [v for name in imports(importer, path) if (v := violation(importer, name))]


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("aptp_ray.train.loop", "from aptp_ray.data.schema import KEY"),
        ("aptp_ray.train.loop", "from aptp_ray.data import schema"),
        ("aptp_ray.train.loop", "from aptp_ray.artifacts import RunDir"),
        ("aptp_ray.core.space", "from .gates import GatedUNet"),
        ("aptp_ray.artifacts", "from aptp_ray.config import Config"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, importer: str, statement: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(statement)
    assert not [v for name in imports(importer, path) if (v := violation(importer, name))]


def run_python(code: str) -> str:
    # A new interpreter: this one has loaded everything already.
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light() -> None:
    code = "import sys, aptp_ray, aptp_ray.core; print([m for m in ('ray', 'wandb', 'torch', 'diffusers') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_public_names_of_the_core_resolve_without_ray() -> None:
    names = ", ".join(PUBLIC_CORE)
    code = (
        f"import sys\nfrom aptp_ray.core import {names}\n"
        f"assert all(callable(x) for x in ({names}))\nprint([m for m in ('ray', 'wandb') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_unknown_names_of_the_core_are_refused() -> None:
    import aptp_ray.core

    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        aptp_ray.core.Nonsense  # noqa: B018


def top_level() -> set[str]:
    """First path components of what belongs to the repository: tracked files, or all files of a copy without git."""
    if not (REPOSITORY / ".git").exists():
        return {path.name for path in REPOSITORY.iterdir()}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split("/")[0] for line in listed}


def test_only_the_agreed_names_stand_at_the_top() -> None:
    names = {name for name in top_level() if not name.startswith(".")}
    assert names <= TOP_LEVEL, f"not agreed upon: {sorted(names - TOP_LEVEL)}"
    assert names >= {"aptp_ray", "jobs", "tests"}
