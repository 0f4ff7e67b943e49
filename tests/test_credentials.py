"""Secrets in storage options: hidden in all that is written, read from the environment, never in a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from aptp_ray.config import Config, ConfigError, load_config, parse_config
from aptp_ray.credentials import has_password, masked, revealed
from aptp_ray.tracking import Tracker

SECRET = "hunter2"
OPEN: dict[str, Any] = {
    "anon": False,
    "endpoint_url": "https://minio.local:9000",
    "client_kwargs": {"region_name": "eu-central-1"},
    "default_block_size": 5_242_880,
    "token": "google_default",
    "username": "ada",
    "proxies": None,
    "timeout": 2.5,
}
HIDDEN: dict[str, Any] = {
    "key": SECRET,
    "secret": SECRET,
    "password": 1234567,
    "connection_string": f"AccountKey={SECRET}",
    "endpoint_url": f"https://ada:{SECRET}@minio.local",
    "client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}},
    "token": {"private_key": SECRET},
    "chain": [SECRET, {"sas-token": SECRET}],
    "what nobody foresaw": SECRET,
}


def config(**changes: Any) -> Config:
    source = {"kind": "webdataset", "train": "a.tar", "validation": "b.tar", "storage_options": HIDDEN}
    tree = {"run_dir": "runs/x", "data": {"source": source}, "teacher": {"source": "somewhere"}, "storage_options": HIDDEN}
    return parse_config(tree | changes)


def test_what_is_no_secret_stays_readable() -> None:
    assert masked(OPEN, "storage_options") == OPEN
    assert revealed(OPEN) == OPEN and revealed(None) == {}


def test_every_secret_becomes_a_reference_that_says_where_it_stood() -> None:
    hidden = masked(HIDDEN, "storage_options")
    assert SECRET not in str(hidden) and "1234567" not in str(hidden)
    assert hidden["key"] == "env:APTP_STORAGE_OPTIONS_KEY"
    assert hidden["client_kwargs"]["headers"]["Authorization"] == "env:APTP_STORAGE_OPTIONS_CLIENT_KWARGS_HEADERS_AUTHORIZATION"
    assert hidden["chain"][1]["sas-token"] == "env:APTP_STORAGE_OPTIONS_CHAIN_1_SAS_TOKEN"
    assert masked(hidden, "elsewhere") == hidden, "a reference is no secret and keeps its name"


def test_references_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", SECRET)
    assert revealed({"a": {"b": ["env:STORE_SECRET", 1]}, "anon": True}) == {"a": {"b": [SECRET, 1]}, "anon": True}
    monkeypatch.delenv("STORE_SECRET")
    with pytest.raises(ConfigError, match=r"storage_options\.a\.b\.0 .*STORE_SECRET is not set") as error:
        revealed({"a": {"b": ["env:STORE_SECRET"]}})
    assert "\n" not in str(error.value)


def test_a_written_config_holds_no_secret_and_goes_on_with_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"secret": SECRET, "client_kwargs": {"region_name": "eu-central-1", "aws_session_token": SECRET}}
    path = tmp_path / "config.yaml"
    path.write_text(config(storage_options=options).to_yaml())
    assert SECRET not in path.read_text() and "eu-central-1" in path.read_text()
    again = load_config(path)
    monkeypatch.setenv("APTP_STORAGE_OPTIONS_SECRET", SECRET)
    monkeypatch.setenv("APTP_STORAGE_OPTIONS_CLIENT_KWARGS_AWS_SESSION_TOKEN", SECRET)
    assert revealed(again.storage_options) == options
    given = load_config(path, ["storage_options.secret=another"])
    assert revealed(given.storage_options)["secret"] == "another"


def test_neither_printing_nor_logging_a_config_shows_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert SECRET not in repr(config()) and SECRET not in str(config())
    sent: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: sent.update(given))
    Tracker(project="p", name="n", config=config(), mode="offline", directory=str(tmp_path))
    assert sent["config"]["data"]["source"]["train"] == "a.tar" and SECRET not in str(sent)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (f"storage_option: {{secret: {SECRET}}}", []),
        (f"storage_options: {SECRET}", []),
        (f"storage_options: [{SECRET}]", []),
        (f"secret: {SECRET}", []),
        (f"storage_options:\n  secret: '{SECRET}\nname: x", []),
        (f"storage_options:\n  secret: {SECRET}: {SECRET}", []),
        ("name: x", [f"storage_options.secret=[{SECRET}"]),
        ("name: x", [f"name.secret={SECRET}"]),
        ("name: x", [f"storage_option.secret={SECRET}"]),
        (f"run_dir: ftp://ada:{SECRET}@store/run", []),
        (f"run_dir: x\nteacher: {{source: 's3://key:{SECRET}@bucket'}}", []),
    ],
)
def test_no_message_shows_a_secret(tmp_path: Path, text: str, overrides: list[str]) -> None:
    path = tmp_path / "config.yaml"
    tree = config(storage_options={}).model_dump(mode="json", exclude={"storage_options"}) if text.startswith("run_dir") else {}
    path.write_text(yaml.safe_dump(tree | yaml.safe_load(text)) if tree else text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_password_in_an_address_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"run_dir holds a password.*storage_options"):
        config(run_dir=f"ftp://ada:{SECRET}@store/run")
    assert not has_password("s3://bucket/a@b:c") and not has_password("https://store:9000/run@v1") and not has_password("C:/x@y")
