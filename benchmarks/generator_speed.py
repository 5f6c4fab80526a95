"""Times autoregressive sampling and a training step, next to transformers' GPT-2 of equal size.

python benchmarks/generator_speed.py

The default network has the size of ViT-S, in float32 on a CPU; all ratios are within one run, on the same processors.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax.benchmark.ceilings import time_call
from vqrae_jax.benchmark.machine import format_machine
from vqrae_jax.benchmark.pytorch_process import child_environment, count_threads
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.generation.autoregression import sample
from vqrae_jax.models.generator import Architecture, CodeTransformer
from vqrae_jax.models.vit import BlocksConfig


def main(arguments: list[str]) -> None:
    """Prints seconds, the best of all rounds, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="Python interpreter with torch and transformers")
    parser.add_argument("--width", type=count, default=384, help="width of the network")
    parser.add_argument("--depth", type=count, default=12, help="number of blocks")
    parser.add_argument("--heads", type=count, default=6, help="attention heads")
    parser.add_argument("--grid", type=count, default=16, help="side of the grid of codes")
    parser.add_argument("--codes", type=count, default=1024, help="size of the codebook")
    parser.add_argument("--images", type=count, default=8, help="images that are sampled at once")
    parser.add_argument("--batch", type=count, default=8, help="images of a training step")
    parser.add_argument("--rounds", type=count, default=3, help="timed calls of each kind, in turns")
    args = parser.parse_args(arguments)
    blocks = BlocksConfig(args.width, args.depth, args.heads, 4 * args.width, act="gelu_tanh", causal=True)
    model = CodeTransformer(Architecture(blocks, args.codes, ((args.grid, args.grid),)))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, args.grid**2), int))
    length = model.config.length
    specification = {
        "width": args.width, "depth": args.depth, "heads": args.heads, "mlp": 4 * args.width, "length": length,
        "num_embeddings": args.codes, "images": args.images, "batch": max(args.batch, args.images),
        "threads": count_threads(),
    }  # fmt: skip
    cached, uncached = build_samplers(model, variables, args.images)
    train = build_training(model, variables, specification["batch"])
    program = pathlib.Path(__file__).with_name("torch_generator.py")
    command = [args.torch_python, "-P", str(program), json.dumps(specification)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=child_environment(), **pipes) as process:
        versions = json.loads(process.stdout.readline())

        def request(task: str) -> float:
            process.stdin.write(f"{task}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        print(format_machine(**versions))
        generate = functools.partial(request, "generate")
        ours, theirs = best_seconds([lambda: time_call(cached), generate], args.rounds)
        print(
            f"sampling {args.images} x {length} codes: {ours:.2f} s, transformers {theirs:.2f} s: {theirs / ours:.2f} x"
        )
        ours, theirs = best_seconds([lambda: time_call(train), functools.partial(request, "train")], args.rounds)
        print(f"training step of {specification['batch']}: {ours:.3f} s, PyTorch {theirs:.3f} s: {theirs / ours:.2f} x")
        process.stdin.close()
    with_cache, without = best_seconds([lambda: time_call(cached), lambda: time_call(uncached)], 1)
    print(f"without the cache: {without:.2f} s: {without / with_cache:.1f} x")
    print(f"equal codes: {np.mean(np.asarray(cached()) == np.asarray(uncached())):.2%}")


def build_samplers(model: CodeTransformer, variables: Any, images: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns functions that sample codes [images, T], with and without the cache."""
    config = model.config
    key = jax.random.key(1)
    hidden = jnp.full((images, config.length), config.num_embeddings)

    @jax.jit
    def cached(variables: Any) -> jax.Array:
        state = model.apply(variables, jnp.zeros(images, int), method="start")
        step = functools.partial(model.apply, variables, method="step")
        return sample(step, state, key, hidden, config.num_embeddings)

    @jax.jit
    def uncached(variables: Any) -> jax.Array:
        def step(codes: jax.Array, previous: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            codes = codes.at[:, t - 1].set(previous)  # at first the last code, which is never an input
            return model.apply(variables, codes)[:, t], codes

        return sample(step, hidden, key, hidden, config.num_embeddings)

    return functools.partial(cached, variables), functools.partial(uncached, variables)


def build_training(model: CodeTransformer, variables: Any, batch: int) -> Callable[[], Any]:
    """Returns a function that does a training step with AdamW and returns its loss."""
    codes = jax.random.randint(jax.random.key(2), (batch, model.config.length), 0, model.config.num_embeddings)
    optimizer = optax.adamw(1e-4)

    def loss(variables: Any) -> jax.Array:
        return model.apply(variables, codes, method="cross_entropy")[0].mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, value

    state = [jax.tree.map(jnp.copy, variables), optimizer.init(variables)]

    def train() -> Any:
        *state[:], value = step(*state)
        return value, state

    return train


def best_seconds(calls: list[Callable[[], float]], rounds: int) -> list[float]:
    """Returns the best of `rounds` for each call, in turns, so that other load affects all alike."""
    times = [[call() for call in calls] for _ in range(rounds + 1)]
    return [min(column) for column in zip(*times[1:], strict=True)]  # the first round compiles


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
