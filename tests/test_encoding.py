"""What encoded rows are made of: compared with the encoders at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aptp_ray.config import UserError
from aptp_ray.encoding import Encoding, EncodingError, pack, unpack

ENCODING = Encoding((4, 8, 8), (24, 16), 32, 64, {"vae": "a", "text_encoder": "b", "tokenizer": "c", "prompt_encoder": "d"})


def test_the_same_encoders_pass() -> None:
    ENCODING.check(vae="a")
    through_json = Encoding.from_json(json.loads(json.dumps(ENCODING.to_json() | {"splits": {}})))
    assert through_json == ENCODING
    ENCODING.check_same(through_json)


def test_a_copy_of_the_encoders_is_the_same_encoder() -> None:
    moved = replace(ENCODING, sources={"pipeline": "/elsewhere/teacher"})
    ENCODING.check_same(moved)
    assert moved == ENCODING and moved.identity() == ENCODING.identity()
    assert Encoding.from_json(moved.to_json()).sources == {"pipeline": "/elsewhere/teacher"}


def test_rows_of_another_version_are_refused() -> None:
    old = {name: value for name, value in ENCODING.to_json().items() if name not in ("mode", "framing")}
    with pytest.raises(EncodingError, match=r"mode, framing.*--overwrite"):
        Encoding.from_json(old)


def test_packed_tensors_come_back() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float16)
    assert (unpack(pack(values), (4, 2)) == values).all()
    ids = np.arange(6, dtype="<i4").reshape(2, 3)
    assert (unpack([row.tobytes() for row in ids], (3,), "<i4") == ids).all()
    with pytest.raises(ValueError, match="encoding.json is not theirs"):
        unpack(pack(values), (4, 3))


@pytest.mark.parametrize("name", ENCODING.fingerprints)
def test_another_encoder_is_named(name: str) -> None:
    other = replace(ENCODING, fingerprints=ENCODING.fingerprints | {name: "another"})
    with pytest.raises(EncodingError, match=rf"another {name} .*jobs/encode\.py --overwrite") as error:
        ENCODING.check_same(other)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 128},
        {"text_shape": (77, 16)},
        {"latent_shape": (4, 16, 16)},
        {"embedding_dim": 8},
        {"text": "tokens"},
        {"mode": "online"},
        {"precision": "bf16"},
        {"framing": {"crop": "random"}},
    ],
    ids=str,
)
def test_another_way_of_encoding_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(EncodingError, match=next(iter(change))):
        ENCODING.check_same(replace(ENCODING, **change))
