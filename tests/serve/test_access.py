"""Keys, the access log, and images as files: the parts of the ingress that need no service."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aptp_ray.config import ConfigError
from aptp_ray.serve.access import AccessLog, ApiKeys
from aptp_ray.serve.images import ImageStore, encode_image


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\nalpha-1\n\nbeta-2, gamma-3  # both of team b\n")
    keys = ApiKeys(str(file))
    assert len(keys) == 3
    assert all(keys.admits(f"Bearer {key}") for key in ("alpha-1", "beta-2", "gamma-3")) and keys.admits("bearer alpha-1")
    wrong = [None, "", "Bearer", "Bearer ", "alpha-1", "Basic alpha-1", "Bearer alpha-1x", "Bearer alpha", "Bearer # team a"]
    assert not any(keys.admits(header) for header in wrong)
    monkeypatch.setenv("SERVICE_KEYS", "delta,epsilon")
    assert ApiKeys("env:SERVICE_KEYS").admits("Bearer epsilon")
    assert "alpha" not in repr(vars(keys)) and "alpha" not in repr(keys)


def test_a_service_never_opens_because_its_keys_are_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    for source in ("env:NOT_SET_ANYWHERE", str(tmp_path / "no"), str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match=source.removeprefix("env:")):
            ApiKeys(source)


def _call(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["facts"]["model"] = "expert-1"
        await send({"type": "http.response.start", "status": 418, "headers": []})

    async def nothing(*_: Any) -> None:
        return None

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(AccessLog(app)(scope, nothing, nothing))  # type: ignore[arg-type]


def test_the_access_log_is_one_line_that_clients_cannot_forge(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        _call('/v1/x"\n{"fake": 1}', [(b"X-Request-Id", b'abc"\r\n 7' + b"z" * 500), (b"authorization", b"Bearer secret")])
    message = caplog.records[-1].getMessage()
    line = json.loads(message.removeprefix("access "))
    assert "\n" not in message and "secret" not in message
    assert (line["status"], line["model"], line["method"]) == (418, "expert-1", "POST")
    assert line["request_id"].startswith("abc????7") and len(line["request_id"]) == 128


def test_images_lie_under_names_that_nobody_can_make_up(tmp_path: Path) -> None:
    store = ImageStore(f"file://{tmp_path}/images", {})
    (tmp_path / "secret.png").write_bytes(b"no")
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    names = [store.put(encode_image(pixels, "png", 100), "png") for _ in range(2)]
    assert names[0] != names[1]
    found = store.get(names[0])
    assert found is not None and (np.asarray(Image.open(io.BytesIO(found))) == pixels).all()
    unknown, other = "0" * 32 + ".png", names[0].replace("png", "gif")
    for name in ("../secret.png", "secret.png", unknown, other, names[0].upper(), names[0] + "\n"):
        assert store.get(name) is None
