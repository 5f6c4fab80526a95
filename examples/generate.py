"""Trains a masked generator on the codes of a tokenized dataset, and decodes images that it samples.

python examples/generate.py runs/quickstart /data/codes samples.png --steps=2000
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import Tokenizer, runtime
from vqrae_jax.config import DataConfig
from vqrae_jax.data import images
from vqrae_jax.data.pipeline import TrainBatches, train_batches
from vqrae_jax.errors import report_errors
from vqrae_jax.generation import masking
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.generation.sampling import pair_labels, sample
from vqrae_jax.models.generator import Architecture, CodeTransformer
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.progress import progress

LABEL_DROPOUT = 0.1  # share of examples without their label, for classifier-free guidance


def train(
    model: CodeTransformer, data: TrainBatches, steps: int, learning_rate: float = 1e-3
) -> tuple[dict, list[float]]:
    """Trains for `steps`; returns the variables and the loss of each step, in nats per masked code."""
    batches = ({"codes": b["codes"].reshape(len(b["codes"]), -1), "label": b["label"]} for b in data)
    first = next(batches)
    variables = jax.jit(model.init)(jax.random.key(0), first["codes"], first["label"])
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(steps // 10, 1000), steps)
    optimizer = optax.adamw(schedule)

    def loss(variables, batch, key):
        mask_key, label_key = jax.random.split(key)
        masked = masking.mask(mask_key, batch["codes"], model.config.num_embeddings)
        dropped = jax.random.uniform(label_key, batch["label"].shape) < LABEL_DROPOUT
        labels = jnp.where((batch["label"] < 0) | dropped, model.config.classes, batch["label"])
        nats, _ = model.apply(variables, masked.indices, labels, batch["codes"], method="cross_entropy")
        return masking.masked_mean(nats, masked)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, state, batch, key):
        value, gradients = jax.value_and_grad(loss)(variables, batch, key)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, value

    state, losses = optimizer.init(variables), []
    chance = np.log(model.config.num_embeddings)
    for i in progress(range(steps), steps, "steps"):
        variables, state, value = step(variables, state, next(batches), jax.random.key(i))
        losses.append(value)
        if i % 100 == 99:
            print(f"step {i + 1}: {float(value):.3f} nats per masked code (chance {chance:.3f})")
    return variables, [float(value) for value in losses]


def sample_codes(
    model: CodeTransformer, variables: dict, labels: jax.Array, guidance: float = 1.0, seed: int = 0, steps: int = 12
) -> jax.Array:
    """Samples the codes [len(labels), N] of images of these classes."""

    @jax.jit
    def run(variables, labels, key):
        c = model.config
        start = jnp.full((len(labels), c.length), c.num_embeddings)
        labels = pair_labels(labels, c.classes) if guidance else labels
        config = SamplerConfig(steps=steps, guidance=guidance)
        return sample(lambda codes: model.apply(variables, codes, labels), key, start, c.num_embeddings, config)

    return run(variables, labels, jax.random.key(seed))


@runtime.log_lines()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of the tokenizer")
    parser.add_argument("codes", help="folder that vqrae tokenize has written with this tokenizer")
    parser.add_argument("output", help="image to write: a row of eight samples for each of the first eight classes")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="images per batch")
    args = parser.parse_args()
    runtime.start()
    tokenizer = Tokenizer.load(args.checkpoint)
    data = train_batches(DataConfig(source="codes", path=args.codes, batch_size=args.batch), seed=0)
    shape, classes = data.source.plan.view_shape, data.source.num_classes
    blocks = BlocksConfig(width=256, depth=6, heads=4, mlp=1024)
    height, width, *levels = shape if len(shape) > 1 else (1, *shape)
    model = CodeTransformer(Architecture(blocks, tokenizer.codebook_size, ((height, width),), *levels, classes=classes))
    variables, _ = train(model, data, args.steps)
    labels = jnp.repeat(jnp.arange(max(1, min(classes, 8))), 8)  # 0 means any class if there are no labels
    samples = np.asarray(sample_codes(model, variables, labels)).reshape(-1, *shape)
    decoded = tokenizer.decode_from_indices(samples)
    rows = decoded.reshape(-1, 8, *decoded.shape[1:]).transpose(0, 2, 1, 3, 4)
    images.write_image(args.output, (rows.reshape(-1, 8 * decoded.shape[2], 3) * 255 + 0.5).astype(np.uint8))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    with report_errors():
        main()
