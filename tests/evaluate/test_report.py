"""The whole stage on a tiny run: figures against what the run directory holds, images against a lone sampler."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.macs import count_macs
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.sampler import Sampler
from aptp_ray.evaluate.generate import draw_group, sample_seed
from aptp_ray.evaluate.report import build_report
from tests.evaluate.conftest import CAPTIONS, ENCODER, EXPERTS, SIDE, TOKENS, tiny_config

PROMPTS = ["a red apple", "a dog", "a train & its <engine>", "a line drawing of a car", "a cat"]
_VOID = {"meta", "img", "br", "rect", "link"}


@pytest.fixture(scope="module")
def figures(report_run: Path, ray_cluster: None) -> dict[str, Any]:
    build_report(tiny_config(report_run), RunDir(str(report_run)), PROMPTS)
    return json.loads((report_run / "report" / "report.json").read_text())


def test_costs_are_those_of_the_unets_on_disk(figures: dict[str, Any], report_run: Path) -> None:
    routed = Counter(pq.read_table(report_run / "assigned" / "validation.parquet")["expert"].to_pylist())
    teacher = count_macs(load_unet(report_run / "teacher" / "unet"), (SIDE // 2, SIDE // 2), TOKENS)
    mean = 0.0
    for expert in figures["experts"]:
        folder = report_run / "experts" / str(expert["id"])
        counted = count_macs(load_unet(folder), (SIDE // 2, SIDE // 2), TOKENS)
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert expert["macs"] == expert["counted_macs"] == counted
        assert expert["parameters"] == sum(weight.numel() for weight in weights.values())
        assert expert["rows"] == 100 + expert["id"]
        mean += routed[expert["id"]] / len(CAPTIONS) * counted / teacher
    assert figures["macs_ratio"] == pytest.approx(mean)


def test_the_strip_adds_up_to_each_experts_macs(figures: dict[str, Any]) -> None:
    sites = figures["sites"]["sites"]
    for expert in figures["experts"]:
        filled = figures["sites"]["fixed_macs"] + sum(site["macs"] * site["kept"][expert["id"]] for site in sites)
        assert filled == pytest.approx(expert["counted_macs"], rel=1e-12)
    assert figures["sites"]["fixed_macs"] + sum(site["macs"] for site in sites) == figures["teacher"]["counted_macs"]


def test_routing_reads_groups_and_metadata(figures: dict[str, Any], report_run: Path) -> None:
    labels = {label["label"]: label for label in figures["routing"]["labels"]}
    # "key" has too many values for a label, "n" is no text.
    assert set(labels) == {"group", "style"}
    rows = pq.read_table(report_run / "assigned" / "validation.parquet").to_pylist()
    for group in ("fruit", "animal", "vehicle"):
        expected = [sum(row["group"] == group and row["expert"] == k for row in rows) for k in range(EXPERTS)]
        assert labels["group"]["counts"][group] == expected
    line = next(row["expert"] for row in rows if row["key"] == "0007")
    assert labels["style"]["counts"]["line"] == [int(k == line) for k in range(EXPERTS)]
    agree = sum(row["alternate_experts"] == [row["expert"]] for row in rows) / len(rows)
    assert figures["routing"]["captions"]["all_agree"] == pytest.approx(agree)


def test_each_image_is_what_its_unet_draws_alone(figures: dict[str, Any], report_run: Path) -> None:
    config = tiny_config(report_run)
    sample = figures["samples"][1]
    assert sample["seed"] == sample_seed(config.report.seed, 1)
    for expert, folder in ((None, "teacher/unet"), (sample["expert"], f"experts/{sample['expert']}")):
        lone = Sampler.from_components(
            load_unet(report_run / folder),
            load_components(report_run / "teacher"),
            scheduler="DDIMScheduler",
            resolution=SIDE,
        )
        (expected,) = lone.generate([PROMPTS[1]], [sample["seed"]], num_inference_steps=3, guidance_scale=3.0)
        images, model = draw_group(config, str(report_run), expert, PROMPTS, [sample["seed"]] * len(PROMPTS), None)
        assert model is None
        # One level of 255: a larger batch rounds its products otherwise.
        assert np.abs(images[1].astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_report_repeats(figures: dict[str, Any], report_run: Path) -> None:
    before = (report_run / "images" / "samples.png").read_bytes()
    build_report(tiny_config(report_run), RunDir(str(report_run)), PROMPTS)
    assert (report_run / "images" / "samples.png").read_bytes() == before
    assert json.loads((report_run / "report" / "report.json").read_text()) == figures


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_stands_alone(figures: dict[str, Any], report_run: Path) -> None:
    html = (report_run / "report" / "index.html").read_text()
    page = _Balance()
    page.feed(html)
    text = " ".join(" ".join(page.text).split())
    assert page.open == []
    # The gallery's pairs, and each expert's image on its card.
    assert len(page.sources) == 3 * len(PROMPTS) and all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|<script|@import|url\(", html)
    assert all(prompt in text for prompt in PROMPTS)  # escaped, not swallowed
    assert f"{figures['experts'][0]['counted_macs']:,}" in text and "1 min 23 s" in text
    assert "The two agree to the integer" in text


def test_a_card_holds_what_is_routed_to_its_expert(figures: dict[str, Any], report_run: Path) -> None:
    table = pq.read_table(report_run / "assigned" / "validation.parquet").to_pylist()
    router = PromptRouter.from_pretrained(report_run / "router", prompt_encoder=resolve_source(ENCODER))
    page = (report_run / "report" / "index.html").read_text().split("<h2>Each expert</h2>")[1].split("</section>")[0]
    shown = page.split("<article")[1:]
    for expert, card in enumerate(figures["cards"]):
        own = [row["caption"] for row in table if row["expert"] == expert]
        alone = [float(router.route([caption]).similarity[0, expert]) for caption in own]
        nearest = [own[index] for index in sorted(range(len(own)), key=lambda index: -alone[index])]
        assert [one["prompt"] for one in card["prompts"]] == nearest[:5]
        assert [one["similarity"] for one in card["prompts"]] == pytest.approx(sorted(alone, reverse=True)[:5], abs=1e-3)
        assert f"<b>{len(own) / len(table):.1%}</b> of the prompts" in shown[expert]
        drawn = [sample["prompt"] for sample in figures["samples"] if sample["expert"] == expert]
        assert re.findall(r'alt="(.*?), expert', shown[expert]) == [escape(prompt) for prompt in drawn]


def test_what_was_not_measured_is_not_shown(figures: dict[str, Any], report_run: Path) -> None:
    page = (report_run / "report" / "index.html").read_text()
    assert figures["hardness"] is None and figures["gains"] is None and figures["tried"] is None
    assert "hard prompts" not in page and "What was tried" not in page


def test_without_prompts_the_first_captions_are_drawn(report_run: Path, ray_cluster: None) -> None:
    build_report(tiny_config(report_run, sampling={"num_inference_steps": 1}), RunDir(str(report_run)))
    found = json.loads((report_run / "report" / "report.json").read_text())
    assert [sample["prompt"] for sample in found["samples"]] == [caption for caption, _, _ in CAPTIONS[:4]]
    with Image.open(report_run / "images" / "samples.png") as sheet:
        assert sheet.width > 4 * 128


def test_a_run_without_routes_is_refused(tmp_path: Path, report_run: Path) -> None:
    (tmp_path / "router").symlink_to(report_run / "router")
    with pytest.raises(RunDirError, match="validation.parquet is not there"):
        build_report(tiny_config(tmp_path), RunDir(str(tmp_path)), PROMPTS)
