"""Measures the error of every sampler of masked diffusion by number of steps, on distributions that can be enumerated.

python benchmarks/sampler_error.py

The predictor is exact, so the error is that of the sampler: the total variation between its samples and the
distribution of N indices. Schedules are "cosine" where nothing else is named.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.commands.command_line import count
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.generation.sampling import sample
from vqrae_jax.runtime import keep_freed_memory

BATCH = 65_536
SAMPLERS = {
    "chance": SamplerConfig("chance"),
    "halton": SamplerConfig("halton"),
    "confidence, noise 4.5": SamplerConfig("confidence"),
    "confidence, no noise": SamplerConfig("confidence", choice_temperature=0.0),
    "remask": SamplerConfig("remask"),
    "chance, linear": SamplerConfig("chance", schedule="linear"),
    "remask, linear": SamplerConfig("remask", schedule="linear"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """A distribution of indices on a grid, by enumeration.

    Attributes:
      grid: height and width.
      num_embeddings: number K of codes.
      states: [S, N], the states with positive probability.
      probabilities: [S].
    """

    grid: tuple[int, int]
    num_embeddings: int
    states: Int[np.ndarray, "S N"]
    probabilities: Float[np.ndarray, " S"]

    def predict(self, indices: Int[Array, "B N"]) -> Float[Array, "B N K"]:
        """Returns the logarithms of the exact conditional probabilities of every index.

        A context without probability is a state of the distribution of which each visible index was replaced with
        probability 1e-6: what a sampler broke is as unlikely as possible, and states that differ least prevail.
        """
        codes = jnp.asarray(jax.nn.one_hot(self.states, self.num_embeddings)).reshape(len(self.states), -1)
        visible = jax.nn.one_hot(indices, self.num_embeddings)  # K, hidden, is zero
        matches = visible.reshape(len(indices), -1) @ codes.T
        posterior = jax.nn.softmax(jnp.log(self.probabilities) - jnp.log(1e-6) * matches)
        return jnp.log(jnp.maximum(posterior @ codes, 1e-30)).reshape(visible.shape)

    @property
    def entropy(self) -> float:
        """Of a state, in nats."""
        return float(-np.sum(self.probabilities * np.log(self.probabilities)))

    def total_variation(self, samples: Int[np.ndarray, "M N"]) -> float:
        """Returns half the sum of absolute differences between probabilities and shares of `samples`, in [0, 1]."""
        places = self.num_embeddings ** np.arange(self.states.shape[1])
        size = self.num_embeddings ** len(places)
        shares = np.bincount(samples @ places, minlength=size) / len(samples)
        shares[self.states @ places] -= self.probabilities
        return float(np.abs(shares).sum() / 2)


def enumerate_states(grid: tuple[int, int], num_embeddings: int) -> Int[np.ndarray, "S h w"]:
    """Returns all states of a grid."""
    states = itertools.product(range(num_embeddings), repeat=grid[0] * grid[1])
    return np.array(list(states), np.int32).reshape(-1, *grid)


def make_joint(weights: Float[np.ndarray, " S"], states: Int[np.ndarray, "S h w"]) -> Joint:
    """Builds the distribution in proportion to `weights`."""
    positive = weights > 0
    flat = states[positive].reshape(positive.sum(), -1)
    return Joint(states.shape[1:], int(states.max()) + 1, flat, weights[positive] / weights.sum())


def pairs() -> Joint:
    """Returns four codes on 2 x 2 positions: both of a row are equal, rows are independent and uniform."""
    states = enumerate_states((2, 2), 4)
    return make_joint(np.float64((states[..., 0] == states[..., 1]).all(1)), states)


def checkerboard() -> Joint:
    """Returns two codes on 3 x 3 positions: one of the two checkerboards."""
    states = enumerate_states((3, 3), 2)
    board = np.indices((3, 3)).sum(0) % 2
    return make_joint(np.float64([(s == board).all() or (s == 1 - board).all() for s in states]), states)


def ising(grid: tuple[int, int] = (2, 3), coupling: float = 0.4) -> Joint:
    """Returns the Ising model with open borders; its coupling is close to the critical one."""
    states = enumerate_states(grid, 2)
    spins = 2 * states - 1
    energy = (spins[:, 1:] * spins[:, :-1]).sum((1, 2)) + (spins[:, :, 1:] * spins[:, :, :-1]).sum((1, 2))
    return make_joint(np.exp(coupling * energy), states)


JOINTS = {"pairs": pairs, "checkerboard": checkerboard, "Ising": ising}


def draw_samples(joint: Joint, config: SamplerConfig, size: int, seed: int = 0) -> Int[np.ndarray, "M N"]:
    """Samples `size` states with the exact predictor, in batches of at most BATCH."""
    batch, positions = min(size, BATCH), joint.states.shape[1]

    @functools.partial(jax.jit, static_argnums=1)
    def run(rows: Int[Array, " B"], steps: int) -> Int[Array, "B N"]:
        start = jnp.full((batch, positions), joint.num_embeddings)
        settings = dataclasses.replace(config, steps=steps)
        return sample(joint.predict, jax.random.key(seed), start, joint.num_embeddings, settings, (joint.grid,), rows)

    rows = jnp.arange(-(-size // batch) * batch).reshape(-1, batch)
    return np.concatenate([run(part, config.steps) for part in rows])[:size]


def main(arguments: list[str]) -> None:
    """Prints one table per distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=count, default=BATCH, help="samples per number in the table")
    parser.add_argument("--joints", nargs="+", choices=JOINTS, default=list(JOINTS), help="distributions")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    for name in args.joints:
        joint = JOINTS[name]()
        positions = joint.states.shape[1]
        chosen = np.random.default_rng(0).choice(len(joint.states), args.samples, p=joint.probabilities)
        floor = joint.total_variation(joint.states[chosen])
        print(f"\n{name}: {len(joint.states)} states, entropy {joint.entropy:.3f} nats, {args.samples} samples;")
        print(f"{floor:.4f} is the error of independent samples of the distribution itself\n")
        print("| sampler | 1 | 2 | 4 | N | 2N | 4N |\n| --- | --- | --- | --- | --- | --- | --- |")
        for title, config in SAMPLERS.items():
            errors: dict[int, str] = {}
            columns = [1, 2, 4, *(factor * positions for factor in (1, 2, 4))]
            used = [steps if config.method == "remask" else min(steps, positions) for steps in columns]
            for steps in dict.fromkeys(used):
                samples = draw_samples(joint, dataclasses.replace(config, steps=steps), args.samples)
                errors[steps] = f"{joint.total_variation(samples):.3f}"
            print("|", " | ".join([title, *(errors[steps] for steps in used)]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
