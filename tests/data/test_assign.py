"""Rows go where the router sends their captions, all of them, once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel
from material import MINILM, Shards, caption_of

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.data.assign import ALTERNATE_EXPERTS, assign_split, routing_table
from aptp_ray.data.encoded import ENCODED_SCHEMA, count_rows, read_encoded, read_encoding, read_table
from aptp_ray.data.schema import CAPTION, EMBEDDING, ENCODED, EXPERT, GROUP, KEY, LATENT_MEAN
from aptp_ray.encoding import Encoding, EncodingError

EXPERTS = 2


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.from_pretrained(resolve_source(MINILM))


@pytest.fixture(scope="module")
def router_dir(run: RunDir, encoder: PromptEncoder) -> str:
    router = _router(encoder)
    z = torch.from_numpy(np.stack(read_table(run, "encoded", "train", columns=[EMBEDDING])[EMBEDDING].to_numpy()))
    router.initialise_codes(z, generator=torch.Generator().manual_seed(0))
    router.fit_potentials(z)
    router.save_pretrained(run.path("router"))
    return run.path("router")


def _router(encoder: PromptEncoder) -> PromptRouter:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    space = ArchitectureSpace.of(unet)
    router = PromptRouter(
        space, z_dim=encoder.dim, num_codes=EXPERTS, generator=torch.Generator().manual_seed(0), predictor_gain=2.0
    )
    return router.attach(encoder)


def test_every_row_goes_to_the_expert_of_its_caption(
    run: RunDir, router_dir: str, shards: Shards, encoder: PromptEncoder
) -> None:
    result = assign_split(run, router_dir=router_dir, num_experts=EXPERTS)
    router = PromptRouter.from_pretrained(router_dir, prompt_encoder=encoder)
    captions = [caption_of(key) for key in shards.keys]
    expected = dict(zip(shards.keys, router.route(captions).expert.tolist(), strict=True))
    before = {row[KEY]: row for row in read_table(run, "encoded", "train", columns=ENCODED).to_pylist()}
    found = {}
    for expert in range(EXPERTS):
        rows = read_table(run, "assigned", f"expert={expert}", columns=ENCODED).to_pylist()
        assert [row[KEY] for row in rows] == [key for key in shards.keys if expected[key] == expert]
        assert all(row == before[row[KEY]] for row in rows)
        found |= {row[KEY]: expert for row in rows}
    assert found == expected
    counts = Counter(expected.values())
    assert result["counts"] == [counts[0], counts[1]] and result["rows"] == result["rows_in"] == len(shards.keys)
    assert sum(result["shares"]) == pytest.approx(1.0)
    even = Counter(expected[key] for key in shards.keys if int(key) % 2 == 0)
    assert result["groups"]["even"] == [even[0], even[1]]

    rows = read_encoded(run, "assigned", columns=[KEY, EXPERT]).take_all()
    assert {row[KEY]: row[EXPERT] for row in rows} == expected
    (batch,) = read_encoded(run, "assigned", "expert=1").iter_batches(batch_size=None)
    assert set(batch[EXPERT].tolist()) == {1} and len(batch[LATENT_MEAN]) == counts[1]
    assert count_rows(run, "assigned", "expert=1") == counts[1]
    assert read_encoding(run, "assigned", "expert=1") == read_encoding(run, "encoded", "train")

    first = {path.name: path.read_bytes() for path in Path(run.path("assigned")).rglob("expert=0/*")}
    assign_split(run, router_dir=router_dir, num_experts=EXPERTS)
    assert {path.name: path.read_bytes() for path in Path(run.path("assigned")).rglob("expert=0/*")} == first


def test_routing_table_holds_captions_and_alternates(
    run: RunDir, router_dir: str, shards: Shards, encoder: PromptEncoder
) -> None:
    table = routing_table(run, router_dir=router_dir, prompt_encoder=encoder, source=("encoded", "train"))
    assert pq.read_table(run.path("assigned", "validation.parquet")).equals(table)
    router = PromptRouter.from_pretrained(router_dir, prompt_encoder=encoder)
    assert table[KEY].to_pylist() == shards.keys
    assert table[EXPERT].to_pylist() == router.route(table[CAPTION].to_pylist()).expert.tolist()
    alternates = router.route(["another " + key for key in shards.keys]).expert.tolist()
    assert table[ALTERNATE_EXPERTS].to_pylist() == [[expert] for expert in alternates]
    assert set(table[GROUP].to_pylist()) == {"even", "odd"}


def test_an_expert_without_rows_is_named_and_nothing_is_written(
    run: RunDir, router_dir: str, tmp_path: Path, encoder: PromptEncoder
) -> None:
    router = PromptRouter.from_pretrained(router_dir, prompt_encoder=encoder)
    router.potentials.copy_(torch.tensor([1e6, 0.0], dtype=torch.float64))
    router.save_pretrained(tmp_path / "router")
    with pytest.raises(ValueError, match=r"routed to expert 1 .*router\.experts"):
        assign_split(run, router_dir=f"{tmp_path}/router", num_experts=EXPERTS, output=("lopsided",))
    assert not run.exists("lopsided") and not [name for name in Path(run.root).iterdir() if name.name.startswith(".")]


def test_embeddings_of_another_encoder_than_the_routers_are_refused(tmp_path: Path, encoder: PromptEncoder) -> None:
    run = RunDir(str(tmp_path))
    made_by = Encoding((4, 8, 8), (12, 16), encoder.dim, 16, {"prompt_encoder": "another"})
    run.write_json(made_by.to_json() | {"splits": {"train": {}}}, "encoded", "encoding.json")
    (tmp_path / "encoded" / "train").mkdir()
    pq.write_table(pa.Table.from_pylist([], schema=ENCODED_SCHEMA), run.path("encoded", "train", "part-000000.parquet"))
    _router(encoder).save_pretrained(run.path("router"))
    with pytest.raises(EncodingError, match="another prompt_encoder"):
        assign_split(run, router_dir=run.path("router"), num_experts=EXPERTS)
    assert not run.exists("assigned")


def test_wrong_number_of_experts_and_missing_rows_are_named(run: RunDir, router_dir: str) -> None:
    with pytest.raises(ValueError, match=r"has 2 experts, router\.experts=4"):
        assign_split(run, router_dir=router_dir, num_experts=4)
    with pytest.raises(RunDirError, match="holds no rows"):
        assign_split(run, router_dir=router_dir, num_experts=EXPERTS, source=("encoded", "validation"))
