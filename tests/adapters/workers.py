"""Processes for the tests of several devices: each scenario runs in every rank and returns what the rank saw."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from parasolver_adapters.distributed import DistributedDenoiser, WorkerError, process_group
from parasolver_adapters.exchange import exchange_of
from parasolver_core import DDIM, DDPM, NoiseSchedule, Rows, Solution, solve
from tests.core.problems import Rational
from tests.reached import calls_of_process

SCHEDULE = NoiseSchedule.linear()
TIMEOUT = 3.0  # for the tests of the timeout; elsewhere a busy machine must not be taken for a lost process
PATIENCE = 50.0
FOREVER = 300.0  # whoever waits so long is found by the guard of `launch`
ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
_PROCESSES = multiprocessing.get_context("forkserver")  # PyTorch and diffusers are imported once
_PROCESSES.set_forkserver_preload([__name__, "tests.adapters.pipeline_workers"])


def launch(scenario: Callable[..., dict[str, Any]], ranks: int, folder: Path, *args: Any) -> list[dict[str, Any]]:
    """What each rank saw; an empty dictionary for one that died. Fails if a rank has not ended after a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)  # pytest's own way of finding packages is not handed on
        forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        _PROCESSES.Process(target=_work, args=(rank, ranks, port, folder, scenario, args), daemon=True)
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 60
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0.1))
    hanging = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    assert not hanging, f"ranks {hanging} hang"
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def _work(rank: int, ranks: int, port: int, folder: Path, scenario: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group(timeout=FOREVER), calls_of_process():
        seen = scenario(rank, *args)
    part = folder / f"rank{rank}.part"
    part.write_text(json.dumps(seen))
    part.rename(folder / f"rank{rank}.json")


def start(batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(denoiser: Any, batch: int = 1, dtype: str = "float32", **options: Any) -> Solution:
    """A run of 20 steps; the options are those of ``solve``, and ``steps``, ``noisy`` and ``start_seed``."""
    rule = DDPM(SCHEDULE) if options.pop("noisy", False) else DDIM(SCHEDULE)
    timesteps = SCHEDULE.timesteps(options.pop("steps", 20))
    x_T = start(batch, getattr(torch, dtype), options.pop("start_seed", 0))
    return solve(denoiser, x_T, timesteps, rule, **({"window": 7, "tolerance": 1e-3} | options))


def bits(solution: Solution) -> list[int]:
    return solution.sample.flatten().view(torch.uint8).tolist()


class Faulty:
    """``Rational``, which on one rank does something else in its third call."""

    def __init__(self, rank: int, fault: Callable[[torch.Tensor], Any], at: int = 1) -> None:
        self.inner, self.fault, self.faulty, self.calls = Rational(), fault, rank == at, 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.faulty and self.calls == 3:
            return self.fault(x)
        return self.inner(x, t)


class SmallMemory:
    """``Rational``, with memory for so many rows."""

    def __init__(self, rows: int) -> None:
        self.inner, self.rows = Rational(), rows

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("no room")
        return self.inner(x, t)


class Labelled:
    """``Rational``, moved by the number of each row's sample."""

    takes_rows = True

    def __init__(self) -> None:
        self.inner = Rational()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.inner(x - torch.as_tensor(rows.samples, dtype=x.dtype)[:, None, None], t)


def same_sample(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    denoiser = Labelled() if options.pop("labelled", False) else Rational()
    shared = DistributedDenoiser(denoiser, timeout=20)
    got, expected = sample(shared, **options), sample(denoiser, **options)
    return {
        "bits": bits(got),
        "expected": bits(expected),
        "rounds": (got.stats.rounds, expected.stats.rounds),
        "mine": shared._local.calls,
    }


def fails(rank: int, fault: str, folder: str) -> dict[str, Any]:
    """A fault in the third call of rank 1, and what each rank makes of it."""
    faults: dict[str, Callable[[torch.Tensor], Any]] = {
        "raise": lambda x: _raise(ValueError("boom")),
        "shape": lambda x: x[:, :1],
        "dtype": lambda x: x.double(),
        "memory": lambda x: _raise(torch.OutOfMemoryError("no room for a single row")),
        "die": lambda x: os._exit(3),
        "hang": lambda x: _until_rank_0_has_left(folder) or x,
    }
    timeout = TIMEOUT if fault == "hang" else FOREVER if fault == "die" else PATIENCE
    denoiser = DistributedDenoiser(
        Faulty(rank, faults[fault]), timeout=timeout, max_rows=1 if fault == "memory" else None
    )
    seen = _error(lambda: sample(denoiser, window=8))
    if fault in ("raise", "shape", "dtype", "memory"):  # the group is as good as new
        seen["after"] = sample(DistributedDenoiser(Rational(), timeout=PATIENCE)).success
    else:
        seen["after"] = _error(lambda: sample(DistributedDenoiser(Rational(), timeout=PATIENCE)))
    return seen


def _until_rank_0_has_left(folder: str) -> None:
    """Sleep until rank 0 is out of its process group."""
    while not (Path(folder) / "rank0.json").exists():
        time.sleep(0.05)


def disagree(rank: int, options: list[dict[str, Any]], gain: list[float]) -> dict[str, Any]:
    """Ranks with different arguments, or different networks."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3).requires_grad_(False)
    network.weight.mul_(gain[rank])
    denoiser = DistributedDenoiser(lambda x, t: network(x), timeout=PATIENCE)
    return _error(lambda: sample(denoiser, **options[rank]))


def leaves(rank: int, how: str) -> dict[str, Any]:
    """Rank 1 leaves its second run alone; a run of both before and after, on the same group."""

    def callback(state: Any) -> None:
        rounds = state.stats.rounds
        if rank == 1 and (rounds == 2 or (how == "last round" and sum(state.steps) == 20)):
            if how in ("callback", "last round"):
                raise KeyError("mine")
            if how == "stop":
                raise StopIteration
            if how == "states":
                state.runs[0].inputs.add_(1.0)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if rank == 1 and how == "interrupt" and len(calls) == 3:
            raise KeyboardInterrupt
        return Rational()(x, t)

    calls: list[int] = []
    late = how == "last round"
    seed = {"seed": "x"} if how == "argument" and rank == 1 else {}
    denoiser = DistributedDenoiser(network, timeout=PATIENCE)
    before = bits(sample(DistributedDenoiser(Rational(), timeout=PATIENCE)))
    options: dict[str, Any] = seed | ({"window": 20, "tolerance": 0.0} if late else {"window": 7})
    seen = _error(lambda: sample(denoiser, callback=callback, **options), BaseException)
    seen["calls"] = len(calls)
    return seen | {"before": before, "after": bits(sample(denoiser))}


def torn(rank: int) -> dict[str, Any]:
    """Rank 1 is interrupted while the processes talk to each other, and starts another run."""
    denoiser = DistributedDenoiser(Rational(), timeout=TIMEOUT)

    def callback(state: Any) -> None:
        if rank == 1 and state.stats.rounds == 2:
            exchange: Any = exchange_of(None)
            exchange._gather = lambda *args: _raise(KeyboardInterrupt())

    seen = _error(lambda: sample(denoiser, callback=callback), BaseException)
    return seen | {"after": _error(lambda: sample(DistributedDenoiser(Rational(), timeout=TIMEOUT)))}


def other_noise(rank: int, kind: str) -> dict[str, Any]:
    """Noise that differs by rank; the network must not be called."""
    calls: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return Rational()(x, t)

    values = torch.randn(20, 2, 2, 3, generator=torch.Generator().manual_seed(rank if kind != "same" else 0))
    noise: Any = values if kind == "array" else lambda step, sample: values[step, sample]
    denoiser = DistributedDenoiser(network, timeout=PATIENCE)
    seen = _error(lambda: bits(sample(denoiser, batch=2, noisy=True, noise=noise)))
    return seen | {"calls": len(calls)}


def small_memory(rank: int) -> dict[str, Any]:
    """Rank 1 has room for two rows only."""
    network = SmallMemory(2 if rank == 1 else 100)
    got = sample(DistributedDenoiser(network, timeout=PATIENCE), window=8, check=False)
    return {"bits": bits(got), "expected": bits(sample(Rational(), window=8)), "max_rows": got.stats.max_rows}


def beside_tensor_parallel(rank: int) -> dict[str, Any]:
    """A network whose matrix is split over one dimension of a mesh; its rows over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("solver", "tensor"))
    matrix = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    own = matrix[:, 3 * mesh["tensor"].get_local_rank() :][:, :3]
    calls = []

    def split(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        parts = [torch.empty(len(x), 3) for _ in range(2)]
        dist.all_gather(parts, torch.tanh(x.flatten(1) @ own), group=mesh["tensor"].get_group())
        return torch.cat(parts, dim=1).view(x.shape)

    def whole(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ matrix).view(x.shape)

    got = sample(DistributedDenoiser(split, mesh["solver"], timeout=20))
    expected = sample(whole)
    difference = float((got.sample - expected.sample).norm() / expected.sample.norm())
    return {"difference": difference, "rows": max(calls), "whole": _refused(lambda: DistributedDenoiser(split, mesh))}


def subgroup(rank: int) -> dict[str, Any]:
    """A group of two processes of three; the third is refused."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return {"refused": _refused(lambda: DistributedDenoiser(Rational(), group))}
    denoiser = DistributedDenoiser(Rational(), group, timeout=PATIENCE)
    return {"bits": bits(sample(denoiser)), "expected": bits(sample(Rational())), "rank": denoiser.rank}


def embedded(rank: int) -> dict[str, Any]:
    from parasolver_adapters.embedded import EmbeddedDenoiser

    denoiser = EmbeddedDenoiser(labels=3, guidance_scale=2.0)
    x_T = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    shared = DistributedDenoiser(denoiser, timeout=20)
    got, expected = (solve(one, x_T, SCHEDULE.timesteps(10), DDIM(SCHEDULE), 6) for one in (shared, denoiser))
    difference = float((got.sample - expected.sample).norm() / expected.sample.norm())
    return {"bits": bits(got), "difference": difference, "rounds": (got.stats.rounds, expected.stats.rounds)}


def automatic(rank: int, cache: str) -> dict[str, Any]:
    """Ranks of different speed choose the same window."""
    os.environ["XDG_CACHE_HOME"] = cache

    def slow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02 * (1 + rank))
        return Rational()(x, t)

    got = sample(DistributedDenoiser(slow, timeout=20), window="auto", steps=50)
    return {"bits": bits(got), "rounds": got.stats.rounds, "message": got.message}


def _raise(error: BaseException) -> Any:
    raise error


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _error(call: Callable[[], Any], kind: type[BaseException] = WorkerError) -> dict[str, Any]:
    """The error that a run ends in, and the state that can be had from it."""
    try:
        call()
    except kind as error:
        solution: Solution | None = getattr(error, "solution", None)
        told = {"type": type(error).__name__, "text": str(error), "rank": getattr(error, "rank", None)}
        if solution is None:
            return told
        finite = bool(np.isfinite(solution.sample.numpy()).all())
        return told | {"status": solution.status.name, "rounds": solution.stats.rounds, "finite": finite}
    return {"type": None}
