"""Fits a codebook to the latents of a continuous autoencoder (RAE), which makes it a tokenizer without training.

vqrae fit-codebook --checkpoint=imported --data=/data/train --codes=256 --output=fitted

The latents are of images at random positions of the data, cropped as `vqrae tokenize` crops them. Encoder and decoder
stay as they are. Decoders that were trained on noisy latents, as most of RAE, are prepared for quantized ones.
"""

import argparse
import sys

import numpy as np
from jaxtyping import Float

from vqrae_jax.commands import command_line
from vqrae_jax.data import pipeline
from vqrae_jax.data.readable import Skipped
from vqrae_jax.inference import fitting
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.progress import progress

BATCH = 16  # neighboring images that are read together
LATENTS = 64  # per code, by default; docs/tokenize.md has the error by their number

parser = command_line.Parser("fit-codebook", __doc__.partition("\n\n")[0])
parser.add_checkpoint()
parser.add_data()
parser.add_count("--codes", "size of the codebook", 16_384, 2**24)
parser.add_count("--depth", "codes per latent: levels of a residual quantizer", 1, 256)
parser.add_count("--limit", f"number of images; by default {LATENTS} latents per code, or all images", None)
parser.add_count("--seed", "of the choice of images and of k-means", 0, 2**32 - 1, least=0)
parser.add_count("--threads", "threads that read and crop images", 4, 1024)
parser.add("--output", "folder for the tokenizer", required=True)


@command_line.names_arguments(command_line.DATA_ARGUMENTS | {"num_embeddings": "--codes"})
def fit_codebook(args: argparse.Namespace) -> Tokenizer:
    """Runs the command; returns the tokenizer that it saves."""
    output = command_line.output_folder(args.output)
    source = pipeline.evaluation_source(command_line.data_config(args))
    tokenizer = Tokenizer.load(args.checkpoint, args.step, encoder=args.encoder)
    positions = tokenizer.module.decoder.tokens or tokenizer.grid**2
    images = min(args.limit or -(-LATENTS * args.codes // positions), len(source))
    fitting.check_count(args.codes, images * positions, images)
    latents = read_latents(tokenizer, source, images, args.seed, args.threads)
    print(f"k-means of {len(latents) * positions:,} latents of {len(latents):,} images")
    fitted, metrics = fitting.fit_codebook(tokenizer, latents, args.codes, args.depth, args.seed)
    fitted.save_pretrained(output)
    print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()))
    print(f"wrote {output}")
    return fitted


def read_latents(
    tokenizer: Tokenizer, source: pipeline.Source, images: int, seed: int, threads: int
) -> Float[np.ndarray, "B h w C"]:
    """Returns the latents of at most `images` images, in batches of neighbors at random positions of a source."""
    blocks = np.random.default_rng(seed).permutation(-(-len(source) // BATCH))[: -(-images // BATCH)]
    skipped, masks, starts = Skipped(), [], [int(block) * BATCH for block in sorted(blocks)]
    batches = pipeline.ordered_batches(source, starts, BATCH, tokenizer.image_size, "one", threads, skipped)

    def crops():
        for batch in batches:
            masks.append(batch["mask"])
            yield batch["image"][:, 0]

    latents = None
    for i, encoded in enumerate(progress(fitting.encode_latents(tokenizer, crops()), len(starts), "batches of images")):
        if latents is None:
            latents = np.empty((len(starts) * BATCH, *encoded.shape[1:]), np.float32)
        latents[i * BATCH : (i + 1) * BATCH] = encoded
    if skipped.count:
        print(f"skipped {skipped.count} images that cannot be read", file=sys.stderr)
    return latents[np.concatenate(masks)][:images]


main = command_line.build_main(parser, fit_codebook)

if __name__ == "__main__":
    main()
