"""Serves a finished run over HTTP until stopped: python jobs/serve.py RUN_DIR [--host H] [--port N] [--storage-option KEY=VALUE].

Secrets are not kept in a run directory, so a store that asks for keys needs them again: --storage-option secret=env:NAME.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from typing import Any

import yaml

from aptp_ray.artifacts import load_run
from aptp_ray.config import Config, ConfigError
from cli import errors_on_one_line, finish, ray_session, say


def serve_until_stopped(config: Config, run_dir: str, *, host: str, port: int) -> None:
    """Starts the service, prints its address, and waits for SIGINT or SIGTERM."""
    from aptp_ray.serve.run import start, stop

    address = start(run_dir, host, port, storage_options=config.storage_options)
    say(f"serving at {address}; stop with Ctrl-C\n{curl_line(address)}")
    finish({"run_dir": run_dir, "stage": "serve", "address": address})
    wait_for_stop()
    stop()


def curl_line(address: str) -> str:
    """A command line that draws one image."""
    body = '{"prompt": "a red apple", "seed": 1}'
    return (
        f"curl -s {address}/v1/images/generations -H 'content-type: application/json' -d '{body}' "
        "| python3 -c 'import sys,json,base64;"
        'open("apple.png","wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )


def wait_for_stop() -> None:
    """Blocks until the process is asked to end."""
    stopped = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stopped.set())
    stopped.wait()


def storage_options(given: Sequence[str]) -> dict[str, Any]:
    """Turns ``KEY=VALUE`` arguments into fsspec's options; values are YAML, ``env:NAME`` is read from the environment."""
    options: dict[str, Any] = {}
    for option in given:
        key, separator, value = option.partition("=")
        if not separator or not key:  # what stands there instead may be the secret itself
            raise ConfigError("--storage-option takes KEY=VALUE, e.g. secret=env:AWS_SECRET_ACCESS_KEY")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--storage-option {key}=...: the value is not YAML; put it in quotes") from None
    return options


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run_dir", help="any fsspec URI")
    arguments.add_argument("--host", help="interface; by default the config's")
    arguments.add_argument("--port", type=int, help="0: a free one; by default the config's")
    arguments.add_argument(
        "--storage-option", action="append", default=[], metavar="KEY=VALUE", help="of the run directory, for fsspec; repeatable"
    )
    options = arguments.parse_args()
    with errors_on_one_line():
        run, config = load_run(options.run_dir, storage_options(options.storage_option))
        host, port = options.host or config.serve.host, config.serve.port if options.port is None else options.port
        with ray_session(config):
            serve_until_stopped(config, run.uri, host=host, port=port)


if __name__ == "__main__":
    main()
