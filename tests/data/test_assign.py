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
from material import MINILM, Shards, caption_of, encode

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.data.assign import ALTERNATE_EXPERTS, assign_split, routing_table
from aptp_ray.data.encoded import (
    ENCODED_SCHEMA,
    LIGHT_SCHEMA,
    count_rows,
    files_of,
    read_encoded,
    read_encoding,
    read_index,
    read_table,
)
from aptp_ray.data.schema import CAPTION, EMBEDDING, EXPERT, GROUP, KEY, LATENT_MEAN, POSITION, SHARD, VIEW
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
    before = {row[KEY]: row for row in read_table(run, "encoded", "train", columns=ENCODED_SCHEMA.names).to_pylist()}
    found = {}
    for expert in range(EXPERTS):
        rows = read_table(run, "assigned", f"expert={expert}", columns=ENCODED_SCHEMA.names).to_pylist()
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

    # One file for each encoded file and expert, under the encoded file's name.
    names = [name for name, _ in read_index(run, "encoded", "train")]
    for expert in range(EXPERTS):
        assert set(name for name, _ in read_index(run, "assigned", f"expert={expert}")) <= set(names)
    router_similarity = router.route(captions).similarity.numpy()
    for expert in range(EXPERTS):
        mine = [row[expert] for row, key in zip(router_similarity, shards.keys, strict=True) if expected[key] == expert]
        assert result["similarity"][expert] == pytest.approx(np.mean(mine), abs=1e-5)


def test_a_second_call_goes_on_from_the_files_that_are_done(
    run: RunDir, router_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = assign_split(run, router_dir=router_dir, num_experts=EXPERTS, output=("again",))
    files = sorted(Path(run.path("again")).rglob("part-*.parquet"))
    content = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    # As a kill leaves it: one entry was not written, one file is of nobody, the summary is missing.
    entries = sorted(Path(run.path("again", "_units")).glob("part-*.json"))
    lost = entries[1].name.removesuffix(".json")
    entries[1].unlink()
    Path(run.path("again", "encoding.json")).unlink()
    stray = Path(run.path("again", f"{EXPERT}=0", "part-000009-000000.parquet"))
    stray.write_bytes(b"half")
    capfd.readouterr()
    assert assign_split(run, router_dir=router_dir, num_experts=EXPERTS, output=("again",)) == facts
    assert not stray.exists() and files == sorted(Path(run.path("again")).rglob("part-*.parquet"))
    for file in files:
        time, data = content[file]
        assert file.read_bytes() == data
        assert (file.stat().st_mtime_ns == time) == (file.name != lost)
    told = capfd.readouterr().err
    assert "similarity" in told and f"{facts['counts'][0]:,}" in told


@pytest.mark.slow  # a minute where the machine is slow
def test_another_router_parts_all_rows_anew(run: RunDir, router_dir: str, tmp_path: Path, encoder: PromptEncoder) -> None:
    before = assign_split(run, router_dir=router_dir, num_experts=EXPERTS, output=("moved",))
    router = PromptRouter.from_pretrained(router_dir, prompt_encoder=encoder)
    z = torch.from_numpy(np.stack(read_table(run, "encoded", "train", columns=[EMBEDDING])[EMBEDDING].to_numpy()))
    # A price at which the first expert keeps the rows of three captions alone.
    margins = router.assign(z).similarity @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    distinct = margins.round(decimals=6).unique()
    price = (distinct[-3] + distinct[-4]) / 2
    router.potentials.copy_(torch.stack([-price / router.epsilon, torch.zeros((), dtype=torch.float64)]))
    router.save_pretrained(tmp_path / "router")
    expected = [int((margins > price).sum()), int((margins < price).sum())]
    after = assign_split(run, router_dir=f"{tmp_path}/router", num_experts=EXPERTS, output=("moved",))
    assert after["counts"] == expected and before["counts"] != expected
    assert [count_rows(run, "moved", f"expert={expert}") for expert in range(EXPERTS)] == expected


@pytest.mark.slow  # a minute where the machine is slow
def test_light_rows_are_assigned_and_still_say_where_they_came_from(
    run: RunDir, router_dir: str, tmp_path: Path, shards: Shards, pipeline_dir: Path
) -> None:
    light = RunDir(str(tmp_path))
    encode(shards.pattern, light, pipeline_dir, mode="online")
    whole = assign_split(run, router_dir=router_dir, num_experts=EXPERTS, output=("whole",))
    assert assign_split(light, router_dir=router_dir, num_experts=EXPERTS)["counts"] == whole["counts"]
    for expert in range(EXPERTS):
        columns = [KEY, SHARD, POSITION, VIEW]
        rows = read_table(light, "assigned", f"expert={expert}", columns=columns)
        assert rows.equals(read_table(run, "whole", f"expert={expert}", columns=columns))
        assert pq.read_schema(files_of(light, "assigned", f"expert={expert}")[0]).names == LIGHT_SCHEMA.names


@pytest.mark.slow  # a minute where the machine is slow
def test_macs_of_the_experts_are_those_that_pruning_recorded(run: RunDir, router_dir: str, tmp_path: Path) -> None:
    assert assign_split(run, router_dir=router_dir, num_experts=EXPERTS)["macs_ratio"] is None
    run.write_json({"experts": [{"macs_ratio": 0.5}, {"macs_ratio": 0.75}]}, "routing.json")
    assert assign_split(run, router_dir=router_dir, num_experts=EXPERTS)["macs_ratio"] == [0.5, 0.75]
    run.remove("routing.json")


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


def test_an_expert_without_rows_is_named_and_nothing_is_published(
    run: RunDir, router_dir: str, tmp_path: Path, encoder: PromptEncoder
) -> None:
    router = PromptRouter.from_pretrained(router_dir, prompt_encoder=encoder)
    router.potentials.copy_(torch.tensor([1e6, 0.0], dtype=torch.float64))
    router.save_pretrained(tmp_path / "router")
    with pytest.raises(ValueError, match=r"routed to expert 1 .*router\.experts"):
        assign_split(run, router_dir=f"{tmp_path}/router", num_experts=EXPERTS, output=("lopsided",))
    assert not run.exists("lopsided", "encoding.json")
    with pytest.raises(RunDirError, match="holds no rows"):
        count_rows(run, "lopsided", "expert=0")


def test_embeddings_of_another_encoder_than_the_routers_are_refused(tmp_path: Path, encoder: PromptEncoder) -> None:
    run = RunDir(str(tmp_path))
    made_by = Encoding((4, 8, 8), (12, 16), encoder.dim, 16, {"prompt_encoder": "another"})
    run.write_json(made_by.to_json() | {"splits": {"train": {}}}, "encoded", "encoding.json")
    (tmp_path / "encoded" / "train").mkdir()
    pq.write_table(pa.Table.from_pylist([], schema=ENCODED_SCHEMA), run.path("encoded", "train", "part-000000-000000.parquet"))
    run.write_json({"files": [["part-000000-000000.parquet", 0]]}, "encoded", "train", "index.json")
    _router(encoder).save_pretrained(run.path("router"))
    with pytest.raises(EncodingError, match="another prompt_encoder"):
        assign_split(run, router_dir=run.path("router"), num_experts=EXPERTS)
    assert not run.exists("assigned")


def test_wrong_number_of_experts_and_missing_rows_are_named(run: RunDir, router_dir: str) -> None:
    with pytest.raises(ValueError, match=r"has 2 experts, router\.experts=4"):
        assign_split(run, router_dir=router_dir, num_experts=4)
    with pytest.raises(RunDirError, match="holds no rows"):
        assign_split(run, router_dir=router_dir, num_experts=EXPERTS, source=("encoded", "validation"))
