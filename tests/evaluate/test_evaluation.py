"""The whole job's work on a tiny run: who draws what, images against a lone sampler, a killed drawing that goes on."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from scipy.stats import spearmanr

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.config import Config, ConfigError
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.int8 import weight_bytes
from aptp_ray.core.macs import count_macs
from aptp_ray.core.sampler import Sampler
from aptp_ray.evaluate.drawn_shards import plan
from aptp_ray.evaluate.encoders import Encoders
from aptp_ray.evaluate.evaluation import SCORES, Work, evaluate, prepare
from aptp_ray.evaluate.generation import Artist, draw, image_seed, missing, open_unet
from aptp_ray.evaluate.hardness import hardest_images
from aptp_ray.evaluate.report import build_report
from aptp_ray.evaluate.systems import Painter, read_captions, short_names, unique_key
from tests.evaluate.conftest import CAPTIONS, EXPERTS, SIDE, TOKENS, tiny_config

SCORER = "package:aptp_ray/demo/weights/scorer"


def config_of(folder: Path, **evaluation: Any) -> Config:
    settings = {"encoder": SCORER, "images_per_file": 3, "replicates": 5, "batch_sizes": [1, 2], "actors": 2}
    return tiny_config(folder, evaluation=settings | evaluation)


@pytest.fixture(scope="module")
def evaluated(report_run: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Work, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(report_run, folder)
    config, run = config_of(folder), RunDir(str(folder))
    work = prepare(config, run)
    # As a job leaves it that was killed after its first shard; drawn in this process, which has imported everything.
    Artist(config, run.uri).draw(work.shards[0])
    references = [np.full((SIDE, SIDE, 3), 20 * index, np.uint8) for index in range(len(work.captions))]
    return folder, work, evaluate(config, run, work, Encoders.load(config), references)


def test_every_caption_is_drawn_once_however_many_systems_ask(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, result = evaluated
    asked = {(painter, caption.key) for cast in work.casts for painter, caption in zip(cast.painters, work.captions, strict=True)}
    drawing = result["drawing"]
    assert sum(len(shard.captions) for shard in work.shards) == len(asked) == drawing["images"] + drawing["found"]
    assert len(asked) < len(work.casts) * len(work.captions)
    files = sorted(path for path in (folder / "evaluation" / "images").rglob("*.tar"))
    assert len(files) == len(work.shards)


def test_who_draws_what(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    routed = dict(
        zip(
            *(pq.read_table(folder / "assigned" / "validation.parquet")[name].to_pylist() for name in ("caption", "expert")),
            strict=True,
        )
    )
    casts = {cast.system.name: cast for cast in work.casts}
    mixture = [painter.expert for painter in casts["mixture"].painters]
    assert mixture == [routed[caption.text] for caption in work.captions]
    dealt = [painter.expert for painter in casts["random-routing"].painters]
    assert sorted(dealt) == sorted(mixture) and dealt != mixture  # type: ignore[type-var]
    assert {painter.expert for painter in casts["teacher"].painters} == {None}
    ratio = json.loads((folder / "routing.json").read_text())["macs_ratio"]
    assert casts["teacher-fewer-steps"].painters[0].steps == round(3 * ratio)
    assert len({painter.expert for painter in casts["one-expert"].painters}) == 1
    assert all(sum(cast.shares.values()) == pytest.approx(1.0) for cast in work.casts)


def test_an_image_is_what_its_unet_draws_alone(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    shard = next(shard for shard in work.shards if shard.painter.expert == work.casts[0].painters[0].expert)
    caption = shard.captions[-1]
    with tarfile.open(folder.joinpath(*shard.parts)) as archive:
        drawn = np.asarray(Image.open(io.BytesIO(archive.extractfile(f"{caption.key}.png").read())))  # type: ignore[union-attr]
        facts = json.loads(archive.extractfile(f"{caption.key}.json").read())  # type: ignore[union-attr]
    assert facts["seed"] == image_seed(0, caption.key)
    lone = Sampler.from_components(
        load_unet(folder.joinpath(*shard.painter.parts)),
        load_components(folder / "teacher"),
        scheduler="DDIMScheduler",
        resolution=SIDE,
    )
    (expected,) = lone.generate([caption.text], [facts["seed"]], num_inference_steps=3, guidance_scale=3.0)
    # One level of 255: a larger batch rounds its products otherwise.
    assert np.abs(drawn.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_experts_are_judged_with_the_weights_that_serve(report_run: Path) -> None:
    config, run = config_of(report_run), RunDir(str(report_run))
    served = config.model_copy(update={"serve": config.serve.model_copy(update={"weights": "int8"})})
    for expert in (0, None):
        painter = Painter(run.uri, expert, 3)
        whole, judged = (weight_bytes(open_unet(one, run, painter, "cpu")) for one in (config, served))
        assert judged < whole if expert is not None else judged == whole


def test_costs_and_scores_are_written(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, result = evaluated
    written = json.loads(folder.joinpath(*SCORES).read_text())
    assert written["systems"].keys() == {cast.system.name for cast in work.casts}
    teacher, mixture = written["systems"]["teacher"], written["systems"]["mixture"]
    macs = count_macs(load_unet(folder / "teacher" / "unet"), (SIDE // 2, SIDE // 2), TOKENS)
    assert teacher["macs_per_image"] == 3 * macs
    expected = sum(one["share"] * one["macs"] * 3 for one in mixture["unets"])
    assert mixture["macs_per_image"] == pytest.approx(expected) and expected < 3 * macs
    assert set(teacher["step_ms"]) == {"1", "2"} and min(teacher["step_ms"].values()) > 0
    assert "encoder" in written["labels"] and "not comparable" in written["labels"]["encoder"]
    for system in written["systems"].values():
        one = system["scores"]["clip_score"]
        assert one["low"] <= one["value"] <= one["high"]
    assert written["differences"]["against"] == "mixture"
    assert "mixture" not in written["differences"]["scores"]["clip_score"]
    groups = mixture["by_group"]
    assert {name: one["images"] for name, one in groups.items()} == {"animal": 3, "fruit": 4, "vehicle": 3}
    shares = result["drawing"]["shares"]
    assert set(shares) == {"loading", "sampling", "packing", "writing", "idle"} and sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0 and shares["sampling"] > 0


def test_likeness_is_that_of_the_images_on_disk(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, result = evaluated
    drawn: dict[tuple[str, str], np.ndarray] = {}
    for file in (folder / "evaluation" / "images").rglob("*.tar"):
        with tarfile.open(file) as archive:
            for member in archive:
                if member.name.endswith(".png") and (content := archive.extractfile(member)):
                    drawn[file.parent.name, member.name[:-4]] = np.asarray(Image.open(content)) / 255.0
    cast = next(cast for cast in work.casts if cast.system.name == "mixture")
    errors = [
        np.square(drawn[painter.name(str(folder)), one.key] - drawn["teacher-3", one.key]).mean()
        for painter, one in zip(cast.painters, work.captions, strict=True)
    ]
    counts = [cast.painters.count(painter) for painter in cast.painters]
    weights = [cast.shares[painter] / count for painter, count in zip(cast.painters, counts, strict=True)]
    scores = {name: system["scores"] for name, system in result["systems"].items()}
    expected = -10 * np.log10(np.average(errors, weights=weights))
    assert scores["mixture"]["teacher_psnr"]["value"] == pytest.approx(expected)
    assert "teacher_psnr" not in scores["teacher"] and "teacher_psnr" in scores["teacher-fewer-steps"]
    assert "teacher" not in result["differences"]["scores"]["teacher_psnr"]


def test_what_is_kept_of_each_caption_is_what_the_scores_are_made_of(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, result = evaluated
    table = pq.read_table(folder / "evaluation" / "captions.parquet")
    assert table["text"].to_pylist() == [caption.text for caption in work.captions]
    for cast in work.casts:
        name, system = cast.system.name, result["systems"][cast.system.name]
        drawn = [system["unets"][index]["expert"] for index in table[f"unet:{name}"].to_pylist()]
        assert drawn == [painter.expert for painter in cast.painters]
        for file, key in zip(table[f"file:{name}"].to_pylist(), table["key"].to_pylist(), strict=True):
            with tarfile.open(folder / file) as archive:
                assert f"{key}.png" in archive.getnames()
        counts = [cast.painters.count(painter) for painter in cast.painters]
        weights = [cast.shares[painter] / count for painter, count in zip(cast.painters, counts, strict=True)]
        scored = np.average(table[f"image_text:{name}"].to_numpy(), weights=weights)
        assert scored == pytest.approx(system["scores"]["clip_score"]["value"], rel=1e-5)
        if name == "teacher":
            assert f"error:{name}" not in table.column_names
        else:
            wrong = np.average(table[f"error:{name}"].to_numpy(), weights=weights)
            assert -10 * np.log10(wrong) == pytest.approx(system["scores"]["teacher_psnr"]["value"])


def test_the_report_tells_whether_hard_prompts_get_more(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    build_report(config_of(folder), RunDir(str(folder)), ["a dog"])
    found = json.loads((folder / "report" / "report.json").read_text())["hardness"]
    assert [(one["kind"], one["system"]) for one in found["measures"]] == [
        ("random_routing", "random-routing"), ("one_expert", "one-expert"), ("image_text", "teacher")
    ]  # fmt: skip
    table = pq.read_table(folder / "evaluation" / "captions.parquet")
    routed = {cast.system.name: cast for cast in work.casts}["mixture"].painters
    macs = [count_macs(load_unet(folder.joinpath(*painter.parts)), (SIDE // 2, SIDE // 2), TOKENS) for painter in routed]
    wrong = table["error:random-routing"].to_numpy()
    alone, scored = (table[name].to_numpy() for name in ("error:one-expert", "image_text:teacher"))
    hard = {"random_routing": wrong, "one_expert": alone, "image_text": -scored}
    for one in found["measures"]:
        assert one["correlation"]["value"] == pytest.approx(spearmanr(macs, hard[one["kind"]]).statistic)
        assert -1 <= one["correlation"]["low"] <= one["correlation"]["high"] <= 1
    order = np.argsort(-wrong)[:6].tolist()
    assert [one["prompt"] for one in found["hardest"]] == [work.captions[index].text for index in order]
    assert [one["expert"] for one in found["hardest"]] == [routed[index].expert for index in order]
    page = (folder / "report" / "index.html").read_text().split("Do hard prompts get more MACs?")[1].split("</section>")[0]
    assert page.count("<figure>") == 6 and page.count("data:image/png") == 18  # mixture, random routing, teacher
    shutil.rmtree(folder / "report")
    images = hardest_images(RunDir(str(folder)), found["hardest"])
    with tarfile.open(folder / found["hardest"][0]["files"]["teacher"]) as archive:
        expected = np.asarray(Image.open(io.BytesIO(archive.extractfile(f"{found['hardest'][0]['key']}.png").read())))  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(images[0]["teacher"]), expected)


def test_a_killed_drawing_goes_on_and_draws_the_same(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, result = evaluated
    assert result["drawing"]["found"] == len(work.shards[0].captions)
    assert result["drawing"]["images"] == sum(len(shard.captions) for shard in work.shards[1:])
    again = folder.joinpath(*work.shards[1].parts)
    before = again.read_bytes()
    again.unlink()
    Artist(config_of(folder), str(folder)).draw(work.shards[1])
    assert again.read_bytes() == before


def test_nothing_is_left_of_a_finished_drawing(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    assert missing(config_of(folder), RunDir(str(folder)), work.shards) == []
    assert draw([], []).images == 0


def test_images_of_other_settings_are_not_mixed_in(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    config = config_of(folder, seed=0).model_copy(
        update={"sampling": tiny_config(folder).sampling.model_copy(update={"guidance_scale": 4.0})}
    )
    with pytest.raises(RunDirError, match="other weights or settings"):
        missing(config, RunDir(str(folder)), work.shards)


def test_a_system_added_at_the_end_leaves_the_shards(evaluated: tuple[Path, Work, dict[str, Any]]) -> None:
    folder, work, _ = evaluated
    systems = [cast.system.model_dump() for cast in work.casts]
    more = prepare(config_of(folder, systems=[*systems, {"name": "x", "kind": "one_expert", "expert": 2}]), RunDir(str(folder)))
    assert [shard.parts for shard in more.shards[: len(work.shards)]] == [shard.parts for shard in work.shards]


def test_keys_outlive_a_move() -> None:
    assert short_names(["/a/b/00.tar", "/a/b/01.tar"]) == {"/a/b/00.tar": "00.tar", "/a/b/01.tar": "01.tar"}
    assert short_names(["/a/00.tar", "/b/00.tar"]) == {"/a/00.tar": "/a/00.tar", "/b/00.tar": "/b/00.tar"}
    assert unique_key("x/00.tar", "7") == "x_00_tar-7"


def test_captions_are_chosen_by_seed(report_run: Path) -> None:
    run = RunDir(str(report_run))
    few, many = (read_captions(run, images=images, seed=0) for images in (4, 8))
    assert len(few) == 4 and {one.key for one in few} < {one.key for one in many}
    assert {one.key for one in read_captions(run, images=4, seed=1)} != {one.key for one in few}
    assert len(read_captions(run, images=1000, seed=0)) == len(CAPTIONS)


def test_what_cannot_be_drawn_is_refused(report_run: Path, tmp_path: Path) -> None:
    run = RunDir(str(report_run))
    with pytest.raises(ConfigError, match=f"experts 0 to {EXPERTS - 1}, not 7"):
        prepare(
            config_of(report_run, systems=[{"name": "m", "kind": "mixture"}, {"name": "x", "kind": "one_expert", "expert": 7}]),
            run,
        )
    (caption,) = read_captions(run, images=2, seed=0)[:1]
    shards = plan(run, prepare(config_of(report_run), run).casts, read_captions(run, images=1000, seed=0), images_per_file=4)
    gone = [type(shards[0])(Painter(str(tmp_path), 0, 3), shards[0].parts, (caption,))]
    with pytest.raises(RunDirError, match="is not there"):
        missing(config_of(report_run), run, gone)


def test_no_shard_waits_behind_a_long_one(report_run: Path, ray_cluster: None, tmp_path: Path) -> None:
    config = config_of(report_run, systems=[{"name": "mixture", "kind": "mixture"}], images_per_file=1)
    shards = prepare(config, RunDir(str(report_run))).shards

    class Scribe:
        """Writes a file a shard; the first shard takes until all the others are there."""

        def ready(self) -> None:
            pass

        def draw(self, shard: Any) -> dict[str, float]:
            file = tmp_path / shard.parts[-1]
            if file.name == shards[0].parts[-1]:
                deadline = time.monotonic() + 60
                while len(list(tmp_path.iterdir())) < len(shards) - 1:
                    assert time.monotonic() < deadline, "the others wait behind this one"
                    time.sleep(0.01)
            file.touch()
            return {"sampling": 0.0}

    start = ray.remote(num_cpus=0)(Scribe)
    pool = [start.remote() for _ in range(2)]  # type: ignore[attr-defined]
    assert draw(pool, shards).images == len(shards) == len(list(tmp_path.iterdir()))
