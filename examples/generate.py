"""A generator on the codes of a tokenized dataset: trains it, and paints pictures that it makes up.

python examples/generate.py runs/quickstart /data/codes made_up.png --steps=2000
"""

import argparse
import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import Tokenizer
from vqrae_jax.data import images
from vqrae_jax.data.codes import Codes
from vqrae_jax.generation import masking
from vqrae_jax.generation.sampling import guided, sample
from vqrae_jax.models.generator import Generator
from vqrae_jax.models.vit import BlocksConfig

ANY_CLASS = 0.1  # share of the pictures whose class the network is not told, for guidance


def batches(codes: Codes, batch_size: int) -> grain.DatasetIterator:
    """Shuffled without end: "codes" [B, N] and "label" [B], -1 where there is none."""
    records = grain.MapDataset.source(codes).seed(0).shuffle().repeat()
    flat = records.map(lambda r: {"codes": r["codes"].reshape(-1).astype(np.int32), "label": np.int32(r["label"])})
    return iter(flat.batch(batch_size, drop_remainder=True).to_iter_dataset())


def train(model: Generator, data: grain.DatasetIterator, steps: int, rate: float = 1e-3) -> tuple[dict, list[float]]:
    """The variables after `steps`, and the loss of each, in nats per hidden code."""
    first = next(data)
    variables = jax.jit(model.init)(jax.random.key(0), first["codes"], first["label"])
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, min(steps // 10, 1000), steps))

    def loss(variables, batch, key):
        for_mask, for_class = jax.random.split(key)
        masked = masking.mask(for_mask, batch["codes"], model.num_embeddings)
        told = (batch["label"] >= 0) & (jax.random.uniform(for_class, batch["label"].shape) >= ANY_CLASS)
        logits = model.apply(variables, masked.codes, jnp.where(told, batch["label"], model.classes))
        return masking.masked_mean(masking.cross_entropy(logits, batch["codes"]), masked)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, state, batch, key):
        value, slope = jax.value_and_grad(loss)(variables, batch, key)
        updates, state = optimizer.update(slope, state, variables)
        return optax.apply_updates(variables, updates), state, value

    state, losses = optimizer.init(variables), []
    for i in range(steps):
        variables, state, value = step(variables, state, next(data), jax.random.key(i))
        losses.append(value)
        if i % 100 == 99:
            print(
                f"step {i + 1}: {float(value):.3f} nats per hidden code (by chance {np.log(model.num_embeddings):.3f})"
            )
    return variables, [float(value) for value in losses]


def make_up(
    model: Generator, variables: dict, labels: jax.Array, guidance: float = 1.0, key: int = 0, steps: int = 12
) -> jax.Array:
    """Codes [len(labels), N] of pictures of these classes."""

    @jax.jit
    def run(variables, labels, key):
        one = functools.partial(model.apply, variables)
        predict = guided(lambda codes: one(codes, labels), one, guidance)
        start = jnp.full((len(labels), model.positions), model.num_embeddings)
        return sample(predict, key, start, model.num_embeddings, steps)

    return run(variables, labels, jax.random.key(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of the tokenizer")
    parser.add_argument("codes", help="what vqrae_jax.commands.tokenize wrote with it")
    parser.add_argument("output", help="the picture: one row of eight for each of the first classes, at most eight")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    tokenizer, codes = Tokenizer.load(given.checkpoint), Codes(given.codes)
    grid = codes[0]["codes"].shape
    classes = 1 + max(int(columns.label.max()) for columns in codes.shards())
    blocks = BlocksConfig(width=256, depth=6, heads=4, mlp=1024)
    model = Generator(blocks, tokenizer.codebook_size, int(np.prod(grid)), classes)
    variables, _ = train(model, batches(codes, given.batch), given.steps)
    labels = jnp.repeat(jnp.arange(max(1, min(classes, 8))), 8)  # without classes 0 stands for any
    painted = tokenizer.decode_from_indices(np.asarray(make_up(model, variables, labels)).reshape(-1, *grid))
    rows = painted.reshape(-1, 8, *painted.shape[1:]).transpose(0, 2, 1, 3, 4)
    images.write_image(given.output, (rows.reshape(-1, 8 * painted.shape[2], 3) * 255 + 0.5).astype(np.uint8))
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
