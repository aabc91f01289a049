"""A server that samples: one process for each GPU, ``uvicorn examples.server:app``.

Requests wait in a queue. A worker thread takes all that wait, up to a limit, and
samples them as one batch. The **window** shrinks as the batch grows, so that a
round has about ``rows`` rows, the number that the device takes in little more than
the time of one:

* one request alone: a wide window, and the answer comes in a few rounds;
* many requests: sequential sampling of the batch, the most samples per second.

Put your network into ``network`` and the device's ``rows`` into ``Sampler``. For
several GPUs start one process for each, with ``CUDA_VISIBLE_DEVICES`` set, behind
any load balancer.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from torch import Tensor

from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import DDIM, NoiseSchedule, Solution, solve, solve_sequential

Model = Callable[..., Tensor]
LEAST = 8  # the smallest window that is worth a round


@dataclass
class Job:
    """One request: its noise, what the network is told, and where the answer goes."""

    noise: Tensor
    condition: Tensor
    answer: Future[tuple[Tensor, int, int]] = field(default_factory=Future)


class Sampler:
    """Samples what waits in a queue, in a thread of its own.

    Args:
        model: ``model(x, t, condition)``, in evaluation mode.
        schedule: what it was trained on.
        prediction_type: what it predicts.
        steps: of DDIM.
        rows: how many rows a round should have; 1 samples sequentially.
        max_batch: how many requests are sampled together at most.
        tolerance: distance to the sequential sample.
    """

    def __init__(
        self, model: Model, schedule: NoiseSchedule, prediction_type: Any, *,
        steps: int = 50, rows: int = 16, max_batch: int = 16, tolerance: float = 0.01,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.prediction_type = (
            model,
            schedule,
            prediction_type,
        )
        self.steps, self.rows, self.max_batch, self.tolerance = (
            steps,
            rows,
            max_batch,
            tolerance,
        )
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, then end."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self, noise: Tensor, condition: Tensor
    ) -> Future[tuple[Tensor, int, int]]:
        """The sample, the size of its batch and the rounds, once they are there."""
        job = Job(noise, condition)
        self._jobs.put(job)
        return job.answer

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, ended = [job], False
            while len(batch) < self.max_batch and not self._jobs.empty() and not ended:
                more = self._jobs.get()
                ended = more is None
                batch += [] if more is None else [more]
            self._answer(batch)
            if ended:
                return

    def _sample(self, denoiser: ModelDenoiser, x_T: Tensor) -> Solution:
        timesteps, rule = self.schedule.timesteps(self.steps), DDIM(denoiser.schedule)
        window = min(self.steps, self.rows // len(x_T))
        if window < LEAST:  # narrow windows save too few rounds for what they cost
            return solve_sequential(denoiser, x_T, timesteps, rule)
        return solve(
            denoiser,
            x_T,
            timesteps,
            rule,
            window,
            tolerance=self.tolerance,
            check=False,
        )

    def _answer(self, batch: list[Job]) -> None:
        try:
            denoiser = ModelDenoiser(
                self.model,
                self.schedule,
                self.prediction_type,
                conditions={"condition": torch.stack([job.condition for job in batch])},
            )
            solution = self._sample(denoiser, torch.stack([job.noise for job in batch]))
            for job, sample in zip(batch, solution.sample, strict=True):
                job.answer.set_result((sample, len(batch), solution.stats.rounds))
        except Exception as error:  # the requests are told; the server goes on
            for job in batch:
                job.answer.set_exception(error)


def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """A stand-in for yours: predicts the noise of data N(condition, 1), exactly."""
    alphas_cumprod = torch.tensor(SCHEDULE.alphas_cumprod, dtype=x.dtype)[t][:, None]
    return (1 - alphas_cumprod).sqrt() * (x - alphas_cumprod.sqrt() * condition)


class Request(BaseModel):
    condition: list[float] = Field(min_length=8, max_length=8)
    seed: int = Field(default=0, ge=0)


SCHEDULE = NoiseSchedule.linear()
sampler = Sampler(network, SCHEDULE, "epsilon")


@asynccontextmanager
async def life(app: FastAPI) -> AsyncIterator[None]:
    sampler.start()
    yield
    sampler.stop()


app = FastAPI(lifespan=life)


@app.get("/health")
def health() -> dict[str, bool]:
    """False once the worker has died: start the process again."""
    return {"alive": sampler.alive}


@app.post("/sample")
async def sample(request: Request) -> dict[str, Any]:
    noise = torch.randn(8, generator=torch.Generator().manual_seed(request.seed))
    try:
        answer = sampler.submit(noise, torch.tensor(request.condition))
        result, together, rounds = await asyncio.wrap_future(answer)
    except Exception as error:
        raise HTTPException(500, f"{type(error).__name__}: {error}") from error
    return {"sample": result.tolist(), "batch": together, "rounds": rounds}
