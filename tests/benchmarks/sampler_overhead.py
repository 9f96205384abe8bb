"""What the sampler costs in time beyond its network calls: sampling against as many bare calls.

    python tests/benchmarks/sampler_overhead.py --batch_size=8 --steps=8

The tiny network of the configs at 64x64 by default. Sampling with k steps is one compiled program, timed
against k compiled calls of the network one after the other, in alternation in one process. Each round gives
the ratio of the two medians, of wall-clock and of CPU seconds. Prints the rounds, their mean, and, last, one
line of JSON. Needs an idle machine; on a busy one read the CPU seconds.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from mcm_jax.config import rows, validation
from mcm_jax.diffusion import sampling
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build
from mcm_jax.system import command_line

_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Image side in pixels.", lower_bound=4)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at once.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "k, the sampler's steps.", lower_bound=1)
_SAMPLERS = flags.DEFINE_multi_string("sampler", ["ddim"], "Of mcm_jax.sampling; repeatable.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Ratios of medians.", lower_bound=1)
_TURNS = flags.DEFINE_integer(
    "turns", 7, "How often each of the two takes its turn in a round.", lower_bound=1
)

NUM_CLASSES = 9


def main() -> None:
    raw = rows.tiny("teacher", dataset="openmoji", resolution=_RESOLUTION.value)
    config = validation.validate(raw)
    network = build.network(config, condition=Classes(NUM_CLASSES))
    params = jax.jit(network.init)(jax.random.key(0))
    keys = sampling.image_keys(jax.random.key(1), jnp.arange(_BATCH_SIZE.value))
    side = _RESOLUTION.value
    z_1 = sampling.initial_noise(keys, (side, side, build.CHANNELS))
    label = jnp.arange(_BATCH_SIZE.value) % NUM_CLASSES
    grid = build.schedule(config)(jnp.linspace(1.0, 1 / _STEPS.value, _STEPS.value))
    call = jax.jit(lambda params, z_t, logsnr_t, label: network.apply(params, z_t, logsnr_t, label, None))

    for sampler in _SAMPLERS.value:
        calls = sampling.network_calls(sampler, _STEPS.value)
        sample = jax.jit(
            lambda params, z_1, label, keys, sampler=sampler: sampling.sample(
                lambda *arguments: network.apply(params, *arguments),
                z_1,
                label,
                keys,
                logsnr=grid,
                sampler=sampler,
            )
        )
        logsnr = [jnp.full(_BATCH_SIZE.value, grid[0])] * calls

        def bare(logsnr=logsnr) -> None:
            z_t = z_1
            # Each call takes what the last gave, as a sampler's do.
            for logsnr_t in logsnr:
                z_t = call(params, z_t, logsnr_t, label)
            z_t.block_until_ready()

        def whole(sample=sample) -> None:
            sample(params, z_1, label, keys).block_until_ready()

        print(f"{sampler}, {calls} network calls, {_BATCH_SIZE.value} images of {side}x{side}")
        rounds = [one_round(whole, bare) for _ in range(_ROUNDS.value)]
        results = {}
        for n, clock in enumerate(("wall", "cpu")):
            pairs = [(sampled[n], called[n]) for sampled, called in rounds]
            ratios = [sampled / called for sampled, called in pairs]
            for (sampled, called), ratio in zip(pairs, ratios, strict=True):
                print(
                    f"  {clock:<5}sampler {1e3 * sampled:7.1f} ms  calls {1e3 * called:7.1f} ms  {ratio:.3f}"
                )
            results[clock] = statistics.mean(ratios)
            print(f"  {clock:<5}mean of {len(ratios)} rounds: {results[clock]:.3f}")
        print(json.dumps({"sampler": sampler, "calls": calls, "ratio": results}))


def one_round(*functions: Callable[[], None]) -> list[tuple[float, float]]:
    """The median wall-clock and CPU seconds of each, taking turns."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in functions]
    for turn in range(_TURNS.value + 1):
        order = range(len(functions)) if turn % 2 else reversed(range(len(functions)))
        for n in order:
            wall, cpu = time.perf_counter(), time.process_time()
            functions[n]()
            # The first turn compiles and warms up.
            if turn:
                seconds[n].append((time.perf_counter() - wall, time.process_time() - cpu))
    return [tuple(map(statistics.median, zip(*times, strict=True))) for times in seconds]


if __name__ == "__main__":
    command_line.run(main)
