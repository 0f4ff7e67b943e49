"""Serves a finished run over HTTP until stopped.

    python jobs/serve.py RUN_DIR [serve.KEY=VALUE ...] [--host H] [--port N] [--storage-option KEY=VALUE]

The run's own config says how, e.g. how many replicas; serve.replicas=2 changes that for this service alone. Secrets are not kept
in a run directory, so a store that asks for keys needs them again: --storage-option secret=env:NAME.
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


def serve_until_stopped(config: Config, run_dir: str, options: dict[str, Any], *, host: str, port: int) -> None:
    """Starts the service, says what it has loaded and where it listens, and waits for SIGINT or SIGTERM."""
    from aptp_ray.serve.run import describe, start, stop

    address = start(run_dir, host, port, storage_options=config.storage_options, options=options)
    say(describe(run_dir, storage_options=config.storage_options, options=options))
    say(f"serving at {address}, and a playground for browsers; stop with Ctrl-C\n{curl_line(address)}")
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


def serve_section(given: Sequence[str]) -> dict[str, Any]:
    """Turns ``serve.KEY=VALUE`` arguments into fields of the config's section; values are YAML."""
    options: dict[str, Any] = {}
    for change in given:
        key, separator, value = change.partition("=")
        if not separator or not key.startswith("serve.") or key == "serve.":
            raise ConfigError(f"{change!r}: a run's service takes serve.KEY=VALUE, e.g. serve.replicas=2")
        try:
            options[key.removeprefix("serve.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: the value {value!r} is not YAML; put it in quotes") from None
    return options


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run_dir", help="any fsspec URI")
    arguments.add_argument("changes", nargs="*", metavar="serve.KEY=VALUE", help="e.g. serve.teacher=true")
    arguments.add_argument("--host", help="interface; by default the config's")
    arguments.add_argument("--port", type=int, help="0: a free one; by default the config's")
    arguments.add_argument(
        "--storage-option", action="append", default=[], metavar="KEY=VALUE", help="of the run directory, for fsspec; repeatable"
    )
    given = arguments.parse_intermixed_args()
    with errors_on_one_line():
        run, config = load_run(given.run_dir, storage_options(given.storage_option))
        changes = serve_section(given.changes)
        host = given.host or changes.get("host") or config.serve.host
        port = changes.get("port", config.serve.port) if given.port is None else given.port
        with ray_session(config):
            serve_until_stopped(config, run.uri, changes, host=host, port=port)


if __name__ == "__main__":
    main()
