"""What README.md shows, run: its quickstart (with a config of few steps, the same code), and every other command's arguments."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from aptp_ray.config import load_config, parse_config
from aptp_ray.plan.fleet import load_fleet
from aptp_ray.sections import Source

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def jobs_of_readme() -> list[list[str]]:
    found = []
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part.split(" | ")[0], comments=True)
            for index, word in enumerate(words):
                if word.startswith("jobs/") and word.endswith(".py"):
                    found.append(words[index:])
    return found


def test_readme_shows_the_quickstart_and_the_tests() -> None:
    assert any(c.startswith("python3 -m venv") and c.endswith("jobs/quickstart.py") for c in COMMANDS)
    assert any(c.startswith("python3 -m venv") and c.endswith("-m pytest -n 2") for c in COMMANDS)


@pytest.mark.parametrize("words", jobs_of_readme(), ids=" ".join)
def test_every_job_and_config_of_readme_is_there(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()
    for word in words[1:]:
        if word.startswith("jobs/configs/"):
            load_config(ROOT / word)
        elif word.startswith("clusters/"):
            load_fleet(ROOT / word)


def test_every_cluster_file_of_readme_is_there() -> None:
    for word in re.findall(r"\bclusters/[\w./-]+", "\n".join(COMMANDS)):
        assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.S), ids=lambda text: text.splitlines()[0][2:32])
def test_every_layout_of_readme_is_a_config(text: str) -> None:
    config = parse_config(yaml.safe_load(text) | {"run_dir": "runs/x", "teacher": {"source": "somewhere"}})
    assert config.data.source.kind in text


def test_readme_shows_every_layout() -> None:
    kinds = {kind.model_fields["kind"].annotation.__args__[0] for kind in get_args(get_args(Source)[0])}
    assert kinds - {"openmoji"} == set(re.findall(r"kind: (\w+)", README))


def test_every_picture_and_file_of_readme_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_the_quickstart_runs_ends_with_an_image_over_http_and_does_nothing_twice(tmp_path: Path) -> None:
    arguments = ["jobs/quickstart.py", "jobs/configs/smoke.yaml", "--run-dir", str(tmp_path / "run"), "--no-serve"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr[-4000:]
    line = json.loads(first.stdout.strip().splitlines()[-1])
    assert abs(line["macs_ratio"] / line["budget"] - 1) <= 0.005
    assert line["request"]["size"] == "64x64" and line["request"]["expert"] in (0, 1)
    for index, expert in enumerate(line["experts"]):
        facts = json.loads((tmp_path / "run" / "experts" / str(index) / "expert.json").read_text())
        assert facts["counted_macs"] == facts["macs"] == expert["macs"]
    for made in ("images/samples.png", "report/index.html", "manifest.json", "routing.json"):
        assert (tmp_path / "run" / made).stat().st_size > 0

    second = run(*arguments)
    assert second.returncode == 0, second.stderr[-4000:]
    assert second.stderr.count("done before, skipped") == 6

    other = run(*arguments, "prune.budget=0.5")
    assert other.returncode == 2
    assert "made with another config" in other.stderr.strip().splitlines()[-1]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"].keys() >= {"prune", "report"}
    assert "budget: 0.65" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune.bugdet=0.5"], ["prune.bugdet"]),
        (["prune.budget=0.05"], ["prune.budget=0.05", "floor"]),
        (
            ["data.source={kind: webdataset, train: nothing/*.tar, validation: nothing/*.tar}"],
            ["nothing/*.tar"],
        ),
        (["run_dir=/proc/aptp"], ["/proc/aptp", "run_dir"]),
        (["teacher.source=nowhere/at-all", "teacher.text_encoder=null"], ["nowhere/at-all"]),
    ],
    ids=["unknown key", "budget below the floor", "no shards", "no permission", "no teacher"],
)
def test_bad_input_is_one_line_before_work_starts(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    given = arguments if arguments[0].startswith("run_dir") else [*arguments, f"run_dir={tmp_path / 'run'}"]
    done = run("jobs/quickstart.py", "jobs/configs/smoke.yaml", *given, "--no-serve", timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("jobs/quickstart.py", "jobs/configs/smoke.yaml", f"run_dir={tmp_path / 'run'}", "--port", port, timeout=120)
    assert done.returncode == 2
    assert port in done.stderr.strip().splitlines()[-1]
