"""What the service counts, on Ray's Prometheus endpoint (there with the prefix ``ray_``; counters also end in ``_total``).

Serve adds the tags ``deployment``, ``replica`` and ``application``; ``expert`` is a model id (``expert-0``, ``teacher``).

| name | kind | tags | what |
|---|---|---|---|
| ``aptp_http_requests`` | counter | ``path``, ``status`` | answers of the ingress, by route template |
| ``aptp_http_latency_ms`` | histogram | ``path`` | from a request's arrival at the ingress to the end of its answer |
| ``aptp_jobs`` | counter | ``expert``, ``outcome`` | jobs (one a prompt): done, failed, cancelled, late, refused, lost |
| ``aptp_images`` | counter | ``expert`` | images drawn |
| ``aptp_spills`` | counter | ``expert``, ``to`` | jobs that another expert drew than the one that routing chose |
| ``aptp_retries`` | counter | ``expert`` | jobs sent again because their replica was lost |
| ``aptp_in_flight`` | gauge | ``expert`` | images with an expert or on their way to it, of this router replica |
| ``aptp_queue_wait_ms`` | histogram | ``expert`` | a job's wait in the expert for a place in its batch |
| ``aptp_step_ms`` | histogram | ``expert`` | mean time of one denoising step of a job |
| ``aptp_decode_ms`` | histogram | ``expert`` | decoding of a job's images |
| ``aptp_batch_size`` | histogram | ``expert`` | mean images in the UNet calls of a job |
| ``aptp_route_ms`` | histogram | - | embedding and assigning a prompt, its wait for a batch included |
| ``aptp_routing_similarity`` | histogram | ``expert`` | similarity of a prompt and the code that it was routed to |
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from aptp_ray.serve.protocol import DrawJob, Outcome

_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000, 60000, 300000]
_OUTCOMES = {200: "done", 400: "failed", 499: "cancelled", 503: "lost", 504: "late"}


class HttpMeters:
    """The ingress's."""

    def __init__(self) -> None:
        self._requests = Counter("aptp_http_requests", "Answers by route and status.", ("path", "status"))
        self._latency = Histogram("aptp_http_latency_ms", "From arrival to the end of the answer.", _MS, ("path",))

    def answered(self, path: str, status: int, milliseconds: float) -> None:
        """Counts one answer."""
        self._requests.inc(1, {"path": path, "status": str(status)})
        self._latency.observe(milliseconds, {"path": path})


class RouterMeters:
    """The router's: of prompts and of the jobs that it follows."""

    def __init__(self) -> None:
        tags = ("expert",)
        self._jobs = Counter("aptp_jobs", "Jobs by expert and outcome.", ("expert", "outcome"))
        self._images = Counter("aptp_images", "Images drawn.", tags)
        self._spills = Counter("aptp_spills", "Jobs drawn by another expert than the routed one.", ("expert", "to"))
        self._retries = Counter("aptp_retries", "Jobs sent again because their replica was lost.", tags)
        self._in_flight = Gauge("aptp_in_flight", "Images with an expert or on their way to it.", tags)
        self._queue = Histogram("aptp_queue_wait_ms", "Wait for a place in the batch.", _MS, tags)
        self._step = Histogram("aptp_step_ms", "Mean time of a denoising step.", _MS, tags)
        self._decode = Histogram("aptp_decode_ms", "Decoding of a job's images.", _MS, tags)
        self._batch = Histogram("aptp_batch_size", "Mean images in the UNet call.", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64], tags)
        self._route = Histogram("aptp_route_ms", "Embedding and assigning a prompt.", _MS)
        # Cosines of centred vectors; a bound of 0 is none that Ray takes.
        bounds = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]
        self._similarity = Histogram("aptp_routing_similarity", "Prompt and chosen code.", bounds, tags)

    def routed(self, model: str, similarity: float, milliseconds: float) -> None:
        """Notes where a prompt belongs."""
        self._route.observe(milliseconds)
        self._similarity.observe(similarity, {"expert": model})

    def in_flight(self, model: str, images: int) -> None:
        """Sets the images under way."""
        self._in_flight.set(images, {"expert": model})

    def spilled(self, model: str, to: str) -> None:
        """Counts a job that another expert draws."""
        self._spills.inc(1, {"expert": model, "to": to})

    def retried(self, model: str, jobs: int) -> None:
        """Counts jobs that are sent again."""
        self._retries.inc(jobs, {"expert": model})

    def refused(self, model: str) -> None:
        """Counts a job for which there was no room."""
        self._jobs.inc(1, {"expert": model, "outcome": "refused"})

    def ended(self, model: str, job: DrawJob, outcome: Outcome) -> None:
        """Counts a job that has ended, with its times."""
        self._jobs.inc(1, {"expert": model, "outcome": _OUTCOMES.get(outcome.status, "failed")})
        if outcome.error is not None:
            return
        tags = {"expert": model}
        self._images.inc(len(outcome.images), tags)
        if outcome.timings is not None:
            self._queue.observe(outcome.timings.queue_ms, tags)
            self._step.observe(outcome.timings.denoise_ms / job.num_inference_steps, tags)
            self._decode.observe(outcome.timings.decode_ms, tags)
            self._batch.observe(outcome.timings.batch_size, tags)
