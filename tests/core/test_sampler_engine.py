"""What the engine promises whoever serves with it: places, sizes, previews, fairness, and work beside the steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from aptp_ray.core.components import TextEncoder
from aptp_ray.core.image_request import Handle, ImageRequest
from aptp_ray.core.sampler import Sampler
from tests.core.small_pipeline import levels, run, same, sampler_of, small_pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return small_pipeline("bert", DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1))


@pytest.fixture
def beside(pipeline: StableDiffusionPipeline) -> Iterator[Sampler]:
    """A sampler with a thread beside."""
    sampler = sampler_of(pipeline, side_threads=1)
    yield sampler
    sampler.close()


def _image(steps: int, seed: int = 0, **options: Any) -> ImageRequest:
    return ImageRequest("a red apple", seed=seed, num_inference_steps=steps, **options)


def _finish(sampler: Sampler) -> None:
    while sampler.busy:
        sampler.step()


# -- one image, any replica -----------------------------------------------------------------------------------------------


def test_a_thread_beside_changes_no_image(pipeline: StableDiffusionPipeline, beside: Sampler) -> None:
    requests = [_image(steps, seed) for seed, steps in enumerate((5, 2, 9, 1, 4, 7, 3, 8, 6, 2))]
    for handle, other in zip(run(beside, requests), run(sampler_of(pipeline, max_batch_size=3), requests), strict=True):
        assert same(handle, other)


@pytest.mark.parametrize("company", [1, 2, 8])
def test_threads_and_company_move_pixels_by_a_level_at_most(company: int, pipeline: StableDiffusionPipeline) -> None:
    threads = torch.get_num_threads()
    alone = run(sampler_of(pipeline), [_image(6, 3)])[0]
    try:
        torch.set_num_threads(2)
        others = [_image(2 + k, k, guidance_scale=1.0 + k % 2) for k in range(company - 1)]
        assert same(run(sampler_of(pipeline), [*others, _image(6, 3)])[-1], alone)
    finally:
        torch.set_num_threads(threads)


def test_in_bfloat16_an_image_stays_close_to_itself() -> None:
    # 8 bits of mantissa: the order of sums shows. What holds is that an image remains that image, not its last bits.
    pipe = small_pipeline("bert", EulerDiscreteScheduler(prediction_type="epsilon"))
    pipe.to(torch.bfloat16)
    requests = [_image(6, seed) for seed in range(8)]
    together = run(sampler_of(pipe), requests)
    assert together[0].latents.dtype == torch.float32
    for request, image in zip(requests, together, strict=True):
        alone = run(sampler_of(pipe), [request])[0]
        assert levels(alone, image) <= 8
        assert np.abs(alone.pixels.astype(int) - image.pixels).mean() <= 1.0
        assert np.abs(together[1].pixels.astype(int) - together[2].pixels).mean() > 4  # other images are further away


# -- places ---------------------------------------------------------------------------------------------------------------


def test_short_images_are_not_starved_by_long_ones(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, max_batch_size=4)
    long = [sampler.submit(_image(200, seed)) for seed in range(3)]
    short = [sampler.submit(_image(5, seed)) for seed in range(6)]  # share the one place that is left, in turn
    calls = 0
    while not all(handle.ended for handle in short):
        sampler.step()
        calls += 1
    assert calls == 6 * 5
    assert [handle.ended_at for handle in short] == sorted(handle.ended_at for handle in short)
    assert {handle.state for handle in long} == {"active"} and long[0].step == calls
    assert all(handle.company / handle.step == 4 for handle in short)


def test_images_are_admitted_in_the_order_of_their_arrival(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, max_batch_size=2)
    handles = [sampler.submit(_image(1 + seed % 3, seed)) for seed in range(9)]
    _finish(sampler)
    admitted = [handle.admitted_at for handle in handles]
    assert admitted == sorted(admitted)
    assert all(h.submitted_at <= h.admitted_at <= h.denoised_at <= h.ended_at for h in handles)


def test_sizes_share_the_engine_and_larger_ones_take_more_places(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, max_batch_size=4)
    assert (sampler.sizes.multiple, sampler.sizes.max_pixels) == (4, 4 * 16 * 16)
    rows: list[tuple[int, ...]] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    try:
        own = sampler.submit(_image(4))
        wide = sampler.submit(_image(4, size=(32, 12)))  # one and a half times the area: two places
        tall = sampler.submit(_image(4, size=(16, 32)))  # two places: waits, and what comes later waits behind it
        last = sampler.submit(_image(4))
        sampler.step()
        assert [h.state for h in (own, wide, tall, last)] == ["active", "active", "waiting", "waiting"]
        assert sorted(rows) == [(2, 4, 6, 16), (2, 4, 8, 8)]
        _finish(sampler)
    finally:
        hook.remove()
    shapes = [handle.pixels.shape for handle in (own, wide, tall, last)]  # type: ignore[union-attr]
    assert shapes == [(16, 16, 3), (12, 32, 3), (32, 16, 3), (16, 16, 3)]
    assert same(own, run(sampler_of(pipeline), [_image(4)])[0])
    assert same(wide, run(sampler_of(pipeline), [_image(4, size=(32, 12))])[0])
    huge = sampler_of(pipeline, max_batch_size=1).submit(_image(2, size=(32, 32)))
    assert huge.state == "waiting"  # larger than the whole batch: drawn alone


def test_an_image_larger_than_the_batch_is_drawn_alone(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, max_batch_size=2)
    handles = [sampler.submit(request) for request in (_image(2), _image(2, size=(32, 32)), _image(2))]
    sampler.step()
    assert [handle.state for handle in handles] == ["active", "waiting", "waiting"]
    _finish(sampler)
    assert [handle.company / handle.step for handle in handles] == [1, 1, 1]


def test_a_unet_call_that_fails_takes_only_its_culprit(pipeline: StableDiffusionPipeline) -> None:
    def picky(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        if (kwargs["encoder_hidden_states"] == 7).all(dim=(1, 2)).any():
            raise RuntimeError("out of memory, say")

    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)

    def sevens(texts: Sequence[str]) -> torch.Tensor:
        states = text(texts)
        for row, one in enumerate(texts):
            if one == "poison":
                states[row] = 7
        return states

    sampler = Sampler(pipeline.unet, pipeline.vae, sevens, pipeline.scheduler)
    hook = pipeline.unet.register_forward_pre_hook(picky, with_kwargs=True)
    try:
        good = [sampler.submit(_image(4, seed)) for seed in range(2)]
        bad = sampler.submit(ImageRequest("poison", num_inference_steps=4))
        _finish(sampler)
    finally:
        hook.remove()
    assert bad.state == "failed" and "out of memory" in str(bad.error)
    for seed, handle in enumerate(good):
        assert same(handle, run(sampler_of(pipeline), [_image(4, seed)])[0])


# -- beside the steps -----------------------------------------------------------------------------------------------------


def test_decoding_holds_up_no_step(pipeline: StableDiffusionPipeline, beside: Sampler) -> None:
    decode, began, may_go_on = pipeline.vae.decode, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        began.set()
        assert may_go_on.wait(60)
        return decode(*args, **kwargs)

    pipeline.vae.decode = slow
    try:
        first, second = beside.submit(_image(2)), beside.submit(_image(400))
        while first.state != "decoding":
            beside.step()
        assert began.wait(60)
        reached = second.step
        third = beside.submit(_image(3, 1))  # one thread beside: this one waits for it, those under way do not
        for _ in range(50):
            beside.step(wait=False)
        assert second.step == reached + 50 and first.state == "decoding"
        assert (beside.active, beside.decoding, beside.waiting) == (1, 1, 1)
        beside.cancel(second)
        may_go_on.set()
        _finish(beside)
    finally:
        may_go_on.set()
        del pipeline.vae.decode
    assert (first.state, third.state, second.state) == ("done", "done", "cancelled")


def test_encoding_holds_up_no_step_and_is_done_together(pipeline: StableDiffusionPipeline) -> None:
    text, may_go_on, asked = TextEncoder(pipeline.tokenizer, pipeline.text_encoder), threading.Event(), []

    def slow(texts: Sequence[str]) -> torch.Tensor:
        asked.append(list(texts))
        if len(asked) > 1:
            assert may_go_on.wait(60)
        return text(texts)

    sampler = Sampler(pipeline.unet, pipeline.vae, slow, pipeline.scheduler, side_threads=1)
    try:
        first = sampler.submit(_image(400))
        while not sampler.active:
            sampler.step()
        later = [sampler.submit(ImageRequest(prompt, num_inference_steps=2)) for prompt in ("blue sky", "fox")]
        reached = first.step
        for _ in range(30):
            sampler.step(wait=False)
        assert first.step == reached + 30 and [handle.state for handle in later] == ["waiting"] * 2
        sampler.cancel(first)
        may_go_on.set()
        _finish(sampler)
        again = sampler.submit(ImageRequest("blue sky", num_inference_steps=2, seed=5))
        _finish(sampler)
    finally:
        may_go_on.set()
        sampler.close()
    assert {handle.state for handle in (*later, again)} == {"done"}
    assert asked == [["a red apple", ""], ["blue sky", "fox"]]  # each text once, the empty one included


def test_cancelled_in_every_state(pipeline: StableDiffusionPipeline) -> None:
    decode, may_go_on = pipeline.vae.decode, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert may_go_on.wait(60)
        return decode(*args, **kwargs)

    pipeline.vae.decode = slow
    sampler = sampler_of(pipeline, max_batch_size=2, side_threads=1)
    try:
        handles = [sampler.submit(_image(1 if seed == 0 else 300, seed)) for seed in range(4)]
        while handles[0].state != "decoding" or handles[2].state != "active":
            sampler.step(wait=False)
            time.sleep(0.001)
        assert [handle.state for handle in handles] == ["decoding", "active", "active", "waiting"]
        for handle in handles:
            sampler.cancel(handle)
        assert not sampler.busy
        may_go_on.set()
        good = run(sampler, [_image(3)])[0]
    finally:
        may_go_on.set()
        sampler.close()
        del pipeline.vae.decode
    assert {handle.state for handle in handles} == {"cancelled"}
    assert all(handle.pixels is None for handle in handles)
    assert same(good, run(sampler_of(pipeline), [_image(3)])[0])


# -- previews -------------------------------------------------------------------------------------------------------------


def _followed(sampler: Sampler, request: ImageRequest) -> tuple[Handle, list[int]]:
    """Draws one image and returns at which steps its previews were there."""
    handle, seen = sampler.submit(request), []
    while sampler.busy:
        sampler.step()
        seen += [handle.step] * (len(handle.previews) - len(seen))
    return handle, seen


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [
        *((DDIMScheduler, prediction) for prediction in ("epsilon", "v_prediction", "sample")),
        *((EulerDiscreteScheduler, prediction) for prediction in ("epsilon", "v_prediction", "sample")),
        *((EulerAncestralDiscreteScheduler, prediction) for prediction in ("epsilon", "v_prediction")),
    ],
)
def test_previews_are_what_the_scheduler_itself_would_predict(kind: type, prediction: str) -> None:
    options = {"clip_sample": False} if kind is DDIMScheduler else {}
    pipe = small_pipeline("bert", kind(prediction_type=prediction, **options))
    predicted: list[torch.Tensor] = []
    step = kind.step  # type: ignore[attr-defined]

    class Told(kind):  # type: ignore[misc, valid-type]
        def step(self, output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
            predicted.append(step(_copy(self), output, timestep, sample, generator=_fork(generator)).pred_original_sample)
            return step(self, output, timestep, sample, generator=generator, return_dict=return_dict)

    sampler = sampler_of(pipe, scheduler=Told.from_config(pipe.scheduler.config))
    sampler._denoiser.linear = False  # the scheduler's own steps, so that it can be asked
    predicted.clear()
    handle, seen = _followed(sampler, _image(8, previews=3, guidance_scale=1.0))
    assert seen == [2, 4, 6] and [preview.number for preview in handle.previews] == [0, 1, 2]
    for preview, index in zip(handle.previews, (1, 3, 5), strict=True):
        with torch.inference_mode():
            image = pipe.vae.decode(predicted[index] / pipe.vae.config.scaling_factor).sample
        expected = ((image[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert levels(preview.pixels, expected) <= 1


def _copy(scheduler: Any) -> Any:
    twin = type(scheduler).__mro__[1].from_config(scheduler.config)
    twin.__dict__.update(scheduler.__dict__)
    return twin


def _fork(generator: torch.Generator | None) -> torch.Generator | None:
    return None if generator is None else torch.Generator().set_state(generator.get_state())


def test_previews_change_no_image_and_come_before_it(pipeline: StableDiffusionPipeline, beside: Sampler) -> None:
    handle, _ = _followed(beside, _image(7, previews=3))
    assert len(handle.previews) == 3 and same(handle, run(sampler_of(pipeline), [_image(7)])[0])
    assert _followed(sampler_of(pipeline), _image(1, previews=3))[1] == []  # nothing lies between
    assert _followed(sampler_of(pipeline), _image(2, previews=3))[1] == [1]
    assert _followed(sampler_of(pipeline), _image(9, previews=1))[1] == [4]


def test_a_thread_that_is_gone_is_not_waited_for(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, side_threads=1)
    assert sampler.alive
    sampler.close()
    assert not sampler.alive
    sampler.submit(_image(2))
    with pytest.raises(RuntimeError, match="has ended"):
        sampler.step()
