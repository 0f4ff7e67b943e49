"""Writes a run's mixture, or one expert, as a folder that opens elsewhere: python jobs/export.py RUN_DIR TARGET.

python jobs/export.py runs/demo /tmp/mixture --licence creativeml-openrail-m --push me/my-mixture
python jobs/export.py runs/demo /tmp/expert-2 --expert 2 --dtype bf16
python jobs/export.py runs/demo /tmp/expert-2.program --expert 2 --format pt2
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
    arguments.add_argument(
        "--format",
        choices=("diffusers", "pt2", "onnx"),
        default="diffusers",
        help="of one expert: a diffusers pipeline, or its denoising model as torch.export's or ONNX's program (extra onnx)",
    )
    arguments.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the experts' weights")
    arguments.add_argument("--licence", help="of the teacher, as the hub names it, e.g. creativeml-openrail-m")
    arguments.add_argument("--push", metavar="OWNER/NAME", help="upload to this model repository of the hub (HF_TOKEN)")
    arguments.add_argument("--public", action="store_true", help="make a new repository public")
    options = arguments.parse_args()
    if options.format != "diffusers" and (options.expert is None or options.push):
        arguments.error(f"--format {options.format} is of one expert (--expert) and is not pushed: it holds no pipeline")
    begun = time.monotonic()
    with errors_on_one_line():
        import torch

        from aptp_ray.artifacts import load_run
        from aptp_ray.hub.export import export_expert, export_mixture, push
        from aptp_ray.hub.formats import export_program

        run, config = load_run(options.run_dir)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
        how = {"licence": options.licence, "repo_id": options.push, "dtype": dtype}
        if options.format != "diffusers":
            figures = export_program(run, config, options.expert, options.target, options.format, dtype=dtype)
            say(f"largest difference to the model itself, over the largest value: {figures['parity']:.2g}")
        elif options.expert is None:
            figures = export_mixture(run, config, options.target, **how)
        else:
            figures = export_expert(run, config, options.expert, options.target, **how)
        if options.licence is None and options.format == "diffusers":
            say("the card says that the teacher's licence was not stated; give it with --licence")
        if options.push:
            figures["commit"] = push(options.target, options.push, private=not options.public)
    finish({"run_dir": run.uri, "stage": "export", "seconds": round(time.monotonic() - begun, 1), **figures})


if __name__ == "__main__":
    main()
