"""Where a mixture lies, and how one part of it after the other becomes a local folder: run directory, export or hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aptp_ray.artifacts import RunDir, RunDirError, load_run, resolve_source
from aptp_ray.config import Config

MIXTURE_FILE = "mixture.json"
MIXTURE_FORMAT = "aptp_ray.mixture/1"


@dataclass(frozen=True)
class Facts:
    """What using a mixture takes besides its models.

    Attributes:
        name: of the run.
        routing: ``routing.json``: budget, MACs ratio and the experts.
        scheduler: name of a diffusers scheduler class.
        num_inference_steps: default.
        guidance_scale: default.
        resolution: pixels of an image's side.
    """

    name: str
    routing: dict[str, Any]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int

    @classmethod
    def of(cls, run: RunDir, config: Config) -> Facts:
        """Reads them from a run directory."""
        return cls(
            name=config.name,
            routing=run.read_json("routing.json"),
            scheduler=config.sampling.scheduler,
            num_inference_steps=config.sampling.num_inference_steps,
            guidance_scale=config.sampling.guidance_scale,
            resolution=config.data.resolution,
        )


class Place(Protocol):
    """A mixture's parts: "router", "teacher", "experts/<k>", "prompt_encoder"."""

    facts: Facts

    def folder(self, part: str) -> Path:
        """Returns a local folder with the content of a part, fetched now if it has to be."""

    def prompt_encoder(self) -> str:
        """Returns what ``PromptEncoder.from_pretrained`` takes."""


class RunPlace:
    """A run directory, on any file system."""

    def __init__(self, uri: str, storage_options: dict[str, Any] | None) -> None:
        self._run, self._config = load_run(uri, storage_options)
        self.facts = Facts.of(self._run, self._config)

    def folder(self, part: str) -> Path:
        return Path(self._run.local(*part.split("/")))

    def prompt_encoder(self) -> str:
        return resolve_source(self._config.router.prompt_encoder, self._config.storage_options)


class ExportPlace:
    """What ``export_mixture`` wrote, in a local folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = json.loads((folder / MIXTURE_FILE).read_text(encoding="utf-8"))
        if found.pop("format", None) != MIXTURE_FORMAT:
            raise RunDirError(f"{folder / MIXTURE_FILE} is not of format {MIXTURE_FORMAT}: another version wrote it")
        self.facts = Facts(routing=json.loads((folder / "routing.json").read_text(encoding="utf-8")), **found)

    def folder(self, part: str) -> Path:
        if not (self._folder / part).is_dir():
            raise RunDirError(f"{self._folder} has no {part}: the export is not whole, or was pulled without it")
        return self._folder / part

    def prompt_encoder(self) -> str:
        return str(self.folder("prompt_encoder"))


class HubPlace(ExportPlace):
    """An export in a repository of the hub; each part is fetched when it is first needed."""

    def __init__(self, repo_id: str, revision: str | None, options: dict[str, Any]) -> None:
        from huggingface_hub import snapshot_download

        def fetch(pattern: str | list[str]) -> Path:
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=pattern, **options))

        self._fetch = fetch
        root = fetch([MIXTURE_FILE, "routing.json"])
        if not (root / MIXTURE_FILE).is_file():
            raise RunDirError(f"{repo_id} on the hub has no {MIXTURE_FILE}: it is no mixture that jobs/export.py pushed")
        super().__init__(root)

    def folder(self, part: str) -> Path:
        self._fetch(f"{part}/*")
        return super().folder(part)


def find_place(source: str, *, revision: str | None = None, storage_options: dict[str, Any] | None = None, **hub: Any) -> Place:
    """Finds a mixture by what its source looks like.

    Args:
        source: a run directory (any fsspec URI), a folder that ``export_mixture`` wrote, or a hub id ``owner/name``.
        revision: of the hub's repository.
        storage_options: of a run directory, for fsspec.
        hub: further arguments of ``snapshot_download``, such as ``token`` and ``endpoint``.

    Raises:
        RunDirError: if there is none.
    """
    folder = Path(source)
    if "://" in source or (folder / "config.yaml").is_file():
        return RunPlace(source, storage_options)
    if (folder / MIXTURE_FILE).is_file():
        return ExportPlace(folder)
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise RunDirError(
            f"{source} is no mixture: a run directory has a config.yaml, an export a {MIXTURE_FILE}, and a hub id is owner/name"
        )
    return HubPlace(source, revision, hub)
