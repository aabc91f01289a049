"""Chunks of actions: each that of the scheduler's own loop, each from the last one, each in time."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from benchmarks.policy import load_policy
from benchmarks.policy_loops import OBSTACLES, TRAINED, Actor, ddim, ddpm
from parasolver_adapters.policies import ActionSampler, _along, _Chunk, held_path, parallel_policy
from parasolver_core import DDPM, DPMSolver, NoiseSchedule, Status, solve_sequential
from tests.adapters.test_loops import seeded
from tests.adapters.tiny_pipelines import distance

SCHEDULE = NoiseSchedule.linear()

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def own(actor: Actor, **options: Any) -> ActionSampler:
    return ActionSampler(actor.network, actor.noise_scheduler, actor.steps, **options)


def chunk(sampler: ActionSampler, discs: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    return sampler((len(discs), 16, 2), {"obstacle": discs}, generator, dtype=torch.float64, **options)


@pytest.mark.parametrize("make", [ddpm, ddim])
def test_a_chunk_is_that_of_the_schedulers_own_loop(make: Any) -> None:
    actor, discs, once, again = make(), OBSTACLES.double(), seeded(), seeded()
    want = [actor.conditional_sample(4, discs, once) for _ in range(3)]
    for tolerance, limit in ((0.0, 1e-6), (1e-2, 1e-2)):  # a scheduler draws and computes c in float32
        sampler, again = own(actor, tolerance=tolerance), seeded()
        assert all(distance(chunk(sampler, discs, again), one) < limit for one in want)
        assert sampler.solution is not None
        assert sampler.solution.stats.rounds < 0.8 * actor.steps
        assert torch.equal(again.get_state(), once.get_state())


def test_noise_that_is_given_and_the_global_stream() -> None:
    actor, discs = ddpm(), OBSTACLES[:2].double()
    noise = torch.randn(2, 16, 2, generator=seeded(), dtype=torch.float64)
    torch.manual_seed(4)
    want, after = actor.conditional_sample(2, discs, noise=noise), torch.rand(1)
    torch.manual_seed(4)
    got = chunk(own(actor, tolerance=0.0, shift=0), discs, noise=noise)
    assert torch.equal(torch.rand(1), after)
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize("make", [ddpm, ddim])
def test_a_warm_start_changes_the_rounds_and_not_the_chunk(make: Any) -> None:
    """Against a plain loop that keeps the noise in the same way."""
    actor, discs = make(), OBSTACLES.double()
    cold, rounds = own(actor, window=32), []
    warm = own(actor, window=32, shift=0)
    plain = own(actor, shift=0, method="sequential")
    generators = seeded(), seeded()
    for move in range(3):
        drifted = discs + move * torch.tensor([0.01, 0.005, 0.0], dtype=torch.float64)
        got, want = (chunk(one, drifted, generator) for one, generator in zip((warm, plain), generators, strict=True))
        assert distance(got, want) < 1e-2
        chunk(cold, drifted, seeded())
        rounds.append((warm.solution.stats.rounds, cold.solution.stats.rounds))  # type: ignore[union-attr]
    assert all(few < 0.75 * many for few, many in rounds[1:])


def test_noise_moves_along_the_horizon_with_new_noise_behind() -> None:
    seen: list[Tensor] = []

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if int(t.max()) == 99:
                seen.append(x[t.argmax()])
            return 0.1 * x

    sampler = ActionSampler(Network().eval(), DDIMScheduler(100), 100, shift=6, check=False)
    generator, first = seeded(), seeded()
    drawn = [torch.randn(1, 16, 2, generator=first) for _ in range(2)]
    for _ in range(2):
        sampler((1, 16, 2), {}, generator)
    assert int(sampler._rule.timesteps[0]) == 99
    torch.testing.assert_close(seen[0], drawn[0][0])
    last = next(x for x in seen if not torch.equal(x, seen[0]))
    torch.testing.assert_close(last[:10], drawn[0][0, 6:])
    torch.testing.assert_close(last[10:], drawn[1][0, 10:])
    sampler.reset()
    sampler((1, 16, 2), {}, seeded())
    torch.testing.assert_close(seen[-1], drawn[0][0])


@pytest.mark.parametrize(("shift", "moved"), [(0, [0, 1, 2, 3]), (1, [1, 2, 3, 13]), (3, [3, 11, 12, 13])])
def test_what_is_left_is_moved_before_the_end_of_the_new(shift: int, moved: list[int]) -> None:
    last, new = torch.arange(4), torch.arange(10, 14)
    assert _along(0, last, new, shift).tolist() == moved
    assert _along(1, last.expand(2, 4), new.expand(2, 4), shift).tolist() == [moved] * 2


@pytest.mark.parametrize("rule", [DDPM(SCHEDULE), DPMSolver(SCHEDULE, order=3, prediction_type="v_prediction")])
def test_a_path_of_one_clean_sample_is_that_of_a_network_that_predicts_it(rule: Any) -> None:
    table = rule.recurrence(SCHEDULE.timesteps(7))
    x_T, clean = torch.randn(2, 4, 2, generator=seeded()).double(), torch.full((2, 4, 2), 0.3).double()
    z = torch.randn(7, 2, 4, 2, generator=seeded()).double()

    def network(x: Tensor, t: Tensor, rows: Any) -> Tensor:
        p, q = (torch.as_tensor(table.held[rows.steps, k])[:, None, None] for k in range(2))
        return (clean[rows.samples] - p * x) / q

    network.takes_rows = True  # type: ignore[attr-defined]
    noise = {"noise": z} if table.stochastic else {}
    want = solve_sequential(network, x_T, SCHEDULE.timesteps(7), rule, save="trajectory", **noise).trajectory
    torch.testing.assert_close(held_path(table, x_T, clean, z if noise else None), want, atol=1e-10, rtol=0)
    assert held_path(table, x_T.half(), clean.half(), None).dtype is torch.float32


@pytest.mark.parametrize("shift", [1, 9])
def test_a_chunk_is_moved_with_its_noise_and_with_the_states_that_were_final(shift: int) -> None:
    """Of one environment two of five steps were final, of the other all; the last action is held."""
    table = DDPM(SCHEDULE).recurrence(SCHEDULE.timesteps(5))
    made = (torch.randn(*shape, generator=seeded()) for shape in ((2, 4, 2), (5, 2, 4, 2), (6, 2, 4, 2), (2, 4, 2)))
    x_T, z, states, sample = made
    fresh, new = torch.full((2, 4, 2), 7.0), torch.full((5, 2, 4, 2), 8.0)
    solution: Any = types.SimpleNamespace(sample=sample, trajectory=states, steps=(2, 5))
    got_x, got_z, start = _Chunk(x_T, z, solution).moved(table, fresh, new, shift)
    stay = max(4 - shift, 0)
    assert got_z is not None
    assert torch.equal(got_x, torch.cat([x_T[:, 4 - stay :], fresh[:, stay:]], 1))
    assert torch.equal(got_z, torch.cat([z[:, :, 4 - stay :], new[:, :, stay:]], 2))
    clean = torch.cat([sample[:, 4 - stay :], sample[:, -1:].expand(2, 4 - stay, 2)], 1)
    want = held_path(table, got_x, clean, got_z)
    for row, final in ((0, 3), (1, 6)):
        want[:final, row, :stay] = states[:final, row, 4 - stay :]
    assert torch.equal(start, want)
    assert _Chunk(x_T, None, solution).moved(table, fresh, new, shift)[1] is None


def test_only_a_chunk_of_the_same_environments_is_gone_on_with() -> None:
    actor, discs = ddim(), OBSTACLES.double()
    sampler = own(actor, shift=4)
    chunk(sampler, discs, seeded())
    assert sampler.solution is not None
    assert sampler.solution.trajectory is not None
    one = chunk(sampler, discs[:1], seeded())
    cold = own(actor)
    assert torch.equal(one, chunk(cold, discs[:1], seeded()))
    assert cold.solution is not None
    assert cold.solution.trajectory is None


def test_a_scheduler_that_draws_once_a_step_is_not_run_for_its_noise() -> None:
    actor, discs = ddpm(), OBSTACLES[:1].double()
    sampler = own(actor)
    chunk(sampler, discs, seeded())
    assert sampler._draws_plainly
    once, again, like = seeded(), seeded(), torch.zeros(1, 16, 2, dtype=torch.float64)
    want = sampler._rule.noise(once, tuple(like.shape), like.dtype, like.device)
    got = sampler._noise(again, like)
    assert got.dtype is torch.float64
    scale = torch.as_tensor(sampler._rule.table.c)[:, None, None, None]
    torch.testing.assert_close(scale * got, scale * want, atol=1e-6, rtol=0)
    assert torch.equal(once.get_state(), again.get_state())


def test_a_path_of_one_clean_sample_leads_there() -> None:
    sampler = own(ddpm())
    x_T, clean = torch.randn(2, 16, 2, generator=seeded()), torch.full((2, 16, 2), 0.3)
    path = held_path(sampler._rule.table, x_T, clean, None)
    assert path.shape == (51, 2, 16, 2)
    torch.testing.assert_close(path[0], x_T)
    torch.testing.assert_close(path[-1], clean, atol=1e-4, rtol=0)


def test_time_that_is_up_gives_an_estimate_from_which_the_next_chunk_begins() -> None:
    actor, discs = ddim(), OBSTACLES.double()
    sampler = own(actor, window=32, shift=0, max_seconds=1e-9)
    exact = chunk(own(actor, shift=0, method="sequential"), discs, seeded())
    errors = []
    for _ in range(4):
        errors.append(distance(chunk(sampler, discs, seeded()), exact))
        assert sampler.solution is not None
        assert sampler.solution.status is Status.MAX_SECONDS
        assert sampler.solution.stats.rounds == 1
    assert errors[-1] < 0.7 * errors[0]


class Config(types.SimpleNamespace):
    horizon, n_action_steps, action_feature = 16, 4, types.SimpleNamespace(shape=(2,))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = load_policy()

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor | None = None) -> Tensor:
        assert global_cond is not None
        return self.policy(x, t, global_cond)


class Model(nn.Module):
    """With the names that LeRobot's has."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.config, self.unet, self.noise_scheduler, self.num_inference_steps = Config(), Unet(), scheduler, 50

    def conditional_sample(
        self, batch_size: int, global_cond: Tensor | None = None, generator: Any = None, noise: Tensor | None = None
    ) -> Tensor:
        sample = torch.randn(size=(batch_size, 16, 2), generator=generator) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            times = torch.full(sample.shape[:1], t, dtype=torch.long)
            output = self.unet(sample, times, global_cond=global_cond)
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class Policy(nn.Module):
    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.diffusion, self.resets = Model(scheduler), 0

    @torch.no_grad()
    def predict(self, batch: Tensor) -> Tensor:
        return self.diffusion.conditional_sample(len(batch), global_cond=batch)[:, 1:5]

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_policy_of_lerobot_is_used_as_before(warm_start: bool) -> None:
    policy = Policy(DDPMScheduler(100, **TRAINED)).eval()
    torch.manual_seed(2)
    want = policy.predict(OBSTACLES)
    sampler = parallel_policy(policy, tolerance=1e-3, warm_start=warm_start)
    torch.manual_seed(2)
    policy.reset()
    assert distance(policy.predict(OBSTACLES), want) < 2e-3
    assert sampler.solution is not None
    assert sampler.solution.stats.rounds < 30
    assert policy.resets == 1
    if warm_start:
        policy.predict(OBSTACLES)
        policy.reset()
        torch.manual_seed(2)
        assert distance(policy.predict(OBSTACLES), want) < 2e-3
    del policy.diffusion.conditional_sample
    torch.manual_seed(2)
    assert torch.equal(policy.predict(OBSTACLES), want)


def test_a_deep_copy_of_a_policy_samples_with_its_own_weights_and_resets_itself() -> None:
    """It asked the first one's network and emptied the first one's queues, without a word."""
    policy = Policy(DDPMScheduler(100, **TRAINED)).eval()
    sampler = parallel_policy(policy, tolerance=1e-3, warm_start=True)
    second, plain = copy.deepcopy(policy), Policy(DDPMScheduler(100, **TRAINED)).eval()
    for one in (second, plain):
        for weight in one.diffusion.unet.parameters():
            weight.data.mul_(0.9)
    torch.manual_seed(2)
    got = second.predict(OBSTACLES)
    torch.manual_seed(2)
    assert distance(got, plain.predict(OBSTACLES)) < 2e-3
    torch.manual_seed(2)
    assert distance(got, policy.predict(OBSTACLES)) > 1e-2
    assert sampler._last is not None
    second.reset()
    assert (policy.resets, second.resets) == (0, 1)
    assert sampler._last is not None  # of the first one
    torch.manual_seed(2)
    assert distance(second.predict(OBSTACLES), got) < 2e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_inference_steps", lambda model: setattr(model, "num_inference_steps", 10)),
        ("noise_scheduler", lambda model: setattr(model, "noise_scheduler", DDIMScheduler(100, **TRAINED))),
        ("noise_scheduler.config", lambda model: model.noise_scheduler.register_to_config(clip_sample=False)),
        ("unet", lambda model: setattr(model, "unet", load_policy())),
    ],
)
def test_a_policy_that_was_changed_since_is_not_sampled_as_it_was(name: str, change: Any) -> None:
    policy = Policy(DDPMScheduler(100, **TRAINED)).eval()
    parallel_policy(policy)
    change(policy.diffusion)
    with pytest.raises(ValueError, match=rf"policy: its {name} has been changed since it was made parallel; call del"):
        policy.predict(OBSTACLES)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ActionSampler(1, DDIMScheduler(), 5), TypeError, "network: expected network"),
        (lambda: ActionSampler(nn.Linear(1, 1), DDIMScheduler(), 5), ValueError, "network: it is in training mode"),
        (lambda: own(ddim(), shift=-1), ValueError, "shift: expected an integer of at least 0"),
        (lambda: own(ddim(), max_seconds=0), ValueError, "max_seconds: expected a number above 0"),
        (lambda: own(ddim(), noise=1), TypeError, "noise: the sampler itself gives it"),
        (lambda: chunk(own(ddim()), OBSTACLES[:0].double()), ValueError, "x_T"),
        (
            lambda: own(ddim())((4, 16, 2), {"obstacle": OBSTACLES[:1].double()}),
            ValueError,
            r"conditions: expected obstacle as a tensor with 4 environments first, got \(1, 3\)",
        ),
        (lambda: parallel_policy(nn.Linear(1, 1)), TypeError, "policy: .* got Linear without conditional_sample; take"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": 3}, TypeError, r"shape: expected \(batch, horizon, actions\), got 3"),
        ({"conditions": [OBSTACLES]}, TypeError, "conditions: expected a dictionary .* got list"),
        (
            {"noise": torch.zeros(1, 16, 2)},
            ValueError,
            r"noise: expected a tensor of shape \(2, 16, 2\), got \(1, 16, 2",
        ),
        ({"noise": [0.0]}, ValueError, r"noise: expected a tensor of shape \(2, 16, 2\), got list"),
    ],
)
def test_calls_that_do_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    """Noise for fewer environments than there are conditions took the first conditions, without a word."""
    sampler = ActionSampler(nn.Identity().eval(), DDIMScheduler(), 5)
    call: dict[str, Any] = {"shape": (2, 16, 2), "conditions": {"global_cond": None}}
    with pytest.raises(error, match=f"^{message}"):
        sampler(**(call | arguments))
