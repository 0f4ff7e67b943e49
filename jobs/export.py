"""Writes a run's mixture, or one expert, as a folder that opens elsewhere: python jobs/export.py RUN_DIR TARGET.

python jobs/export.py runs/demo /tmp/mixture --licence creativeml-openrail-m --push me/my-mixture
python jobs/export.py runs/demo /tmp/expert-2 --expert 2 --dtype bf16
"""

from __future__ import annotations

import argparse
import time

from cli import errors_on_one_line, finish, say


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run_dir", help="of a finished run, any fsspec URI")
    arguments.add_argument("target", help="local folder; replaced if it is there")
    arguments.add_argument("--expert", type=int, help="only this one, as a whole diffusers pipeline")
    arguments.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the experts' weights")
    arguments.add_argument("--licence", help="of the teacher, as the hub names it, e.g. creativeml-openrail-m")
    arguments.add_argument("--push", metavar="OWNER/NAME", help="upload to this model repository of the hub (HF_TOKEN)")
    arguments.add_argument("--public", action="store_true", help="make a new repository public")
    options = arguments.parse_args()
    begun = time.monotonic()
    with errors_on_one_line():
        import torch

        from aptp_ray.artifacts import load_run
        from aptp_ray.hub.export import export_expert, export_mixture, push

        run, config = load_run(options.run_dir)
        how = {
            "licence": options.licence,
            "repo_id": options.push,
            "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype],
        }
        if options.expert is None:
            figures = export_mixture(run, config, options.target, **how)
        else:
            figures = export_expert(run, config, options.expert, options.target, **how)
        if options.licence is None:
            say("the card says that the teacher's licence was not stated; give it with --licence")
        if options.push:
            figures["commit"] = push(options.target, options.push, private=not options.public)
    finish({"run_dir": run.uri, "stage": "export", "seconds": round(time.monotonic() - begun, 1), **figures})


if __name__ == "__main__":
    main()
