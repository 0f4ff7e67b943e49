"""Makes a run directory of a published APTP checkpoint: python jobs/import_reference.py CONFIG CHECKPOINT [key=value ...].

CHECKPOINT is a folder, or a hub id (rezashkv/APTP), whose part for one dataset --subfolder names.
"""

from __future__ import annotations

import time
from pathlib import Path

from aptp_ray.artifacts import open_run
from aptp_ray.config import UserError, load_config
from cli import errors_on_one_line, finish, parser, say


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--subfolder", default="", help="of the checkpoint")
    options = arguments.parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        if not options.overrides or "=" in options.overrides[0]:
            raise UserError("name the checkpoint after the config: a folder, or a hub id")
        source, *overrides = options.overrides
        if options.run_dir:
            overrides.append(f"run_dir={options.run_dir}")
        config = load_config(options.config, overrides)
        run = open_run(config)
        if run.exists("routing.json") and not options.overwrite:
            raise UserError(f"{run.uri} holds a run already: choose another run_dir, or pass --overwrite")
        from aptp_ray.hub.importing import import_reference

        root = Path(source)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            root = Path(snapshot_download(source, allow_patterns=f"{options.subfolder}/*" if options.subfolder else None))
        try:
            figures = import_reference(root / options.subfolder, config, run)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
    for line in figures["not_exact"]:
        say(f"not carried over exactly: {line}")
    finish({"run_dir": run.uri, "stage": "import", "seconds": round(time.monotonic() - begun, 1), **figures})


if __name__ == "__main__":
    main()
