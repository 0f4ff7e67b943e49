"""The whole road on the embedded demo, or on your config: pipeline, report, service, and one request over HTTP.

    python jobs/quickstart.py [CONFIG] [key=value ...] [--run-dir URI] [--port N] [--no-serve]

Run again, it goes straight to serving.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.request
from typing import Any

from aptp_ray.artifacts import open_run
from cli import DEMO_CONFIG, errors_on_one_line, finish, load, parser, ray_session, say
from pipeline import check, figures, run_pipeline
from serve import curl_line, wait_for_stop
from stages import STAGE_FUNCTIONS


def request_image(address: str, prompt: str) -> dict[str, Any]:
    """Asks the service for one image and checks that it is one.

    Returns:
        ``{"prompt", "expert", "seconds", "size"}``.
    """
    from PIL import Image

    body = json.dumps({"prompt": prompt, "seed": 1}).encode()
    request = urllib.request.Request(
        f"{address}/v1/images/generations", body, {"content-type": "application/json"}, method="POST"
    )
    begun = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as answer:
        reply = json.load(answer)
    seconds = round(time.monotonic() - begun, 2)
    image = Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    image.load()
    extremes = image.convert("L").getextrema()
    if extremes[0] == extremes[1]:
        raise RuntimeError(f"the service answered {prompt!r} with a blank image ({image.size}, one value)")
    return {"prompt": prompt, "expert": reply["aptp"]["expert"], "seconds": seconds, "size": f"{image.width}x{image.height}"}


def main() -> None:
    arguments = parser(__doc__, default_config=DEMO_CONFIG, can_dry_run=True)
    arguments.add_argument("--port", type=int, help="of the service; 0: a free one; by default the config's")
    arguments.add_argument("--no-serve", action="store_true", help="end after the request to itself")
    options = arguments.parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        from aptp_ray.serve.run import describe, free_port, start, stop

        config = load(options)
        run = open_run(config)
        if options.dry_run:
            from dry_run import dry_run

            found = dry_run(config, run, list(STAGE_FUNCTIONS), overwrite=options.overwrite)
            finish({"run_dir": run.uri, "stage": "quickstart", **found})
            return
        port = config.serve.port if options.port is None else options.port
        if options.no_serve and options.port is None:
            port = 0
        port = free_port(config.serve.host, port)
        check(config, run, overwrite=options.overwrite)
        with ray_session(config):
            run_pipeline(config, run, overwrite=options.overwrite)
            say("serve: starting")
            address = start(run.uri, config.serve.host, port, storage_options=config.storage_options)
            say(describe(run.uri, storage_options=config.storage_options))
            reply = request_image(address, (config.report.prompts or ["a red apple"])[0])
            say(f"serve: {reply['prompt']!r} was drawn by expert {reply['expert']} in {reply['seconds']} s")
            say(f"report: {run.address('report', 'index.html')}\nsamples: {run.address('images', 'samples.png')}")
            line = {
                "run_dir": run.uri,
                "stage": "quickstart",
                "seconds": round(time.monotonic() - begun, 1),
                **figures(config, run),
                "address": address,
                "request": reply,
            }
            if not options.no_serve:
                say(f"serving at {address}; stop with Ctrl-C\n{curl_line(address)}")
                finish(line)
                wait_for_stop()
            stop()
    if options.no_serve:
        finish(line)


if __name__ == "__main__":
    main()
