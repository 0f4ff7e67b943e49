"""What encoded rows are made of: compared with the encoders at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aptp_ray.config import UserError
from aptp_ray.encoding import Encoding, EncodingError

ENCODING = Encoding((4, 8, 8), (24, 16), 32, 64, {"vae": "a", "text_encoder": "b", "tokenizer": "c", "prompt_encoder": "d"})


def test_the_same_encoders_pass() -> None:
    ENCODING.check(vae="a")
    ENCODING.check_same(Encoding.from_json(ENCODING.to_json()))


@pytest.mark.parametrize("name", ENCODING.fingerprints)
def test_another_encoder_is_named(name: str) -> None:
    other = replace(ENCODING, fingerprints=ENCODING.fingerprints | {name: "another"})
    with pytest.raises(EncodingError, match=rf"another {name} .*jobs/encode\.py --overwrite") as error:
        ENCODING.check_same(other)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"resolution": 128}, {"text_shape": (77, 16)}, {"latent_shape": (4, 16, 16)}, {"embedding_dim": 8}], ids=str
)
def test_another_shape_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(EncodingError, match=next(iter(change))):
        ENCODING.check_same(replace(ENCODING, **change))
