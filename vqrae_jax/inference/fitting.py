"""Codebooks fitted to the latents of a model that is trained already, without a training step."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables, start_quantizer
from vqrae_jax.config import QuantizerParams
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import codebook_health
from vqrae_jax.inference.batching import leaf_shardings
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.quantizers.none import NoQuantizer


def encode_latents(
    tokenizer: Tokenizer, batches: Iterable[Shaped[np.ndarray, "_ S S 3"]]
) -> Iterator[Float[np.ndarray, "_ h w C"]]:
    """Yields what the quantizer of a tokenizer receives: the latents of `Tokenizer.stream`'s batches of images."""
    parts = {name: tokenizer.variables["params"][name] for name in ("encoder", "decoder")}
    changes = {"quantizer": NoQuantizer(), "latent_stats": (), "quantize_before_reshape": False, "reshape_to_2d": True}
    continuous = Tokenizer(
        tokenizer.module.clone(**changes), {"params": parts, "batch_stats": {}}, mesh=tokenizer.mesh,
        encoder_dtype=tokenizer.encoder_dtype,
    )  # fmt: skip
    return continuous.stream("encode", batches)


def check_count(num_embeddings: int, latents: int, images: int) -> None:
    """Raises DataError if a codebook is larger than the number of latents that it is fitted to."""
    if latents < num_embeddings:
        problem = f"is more than the {latents} latents of {images} images; use more images, or fewer codes"
        raise DataError(problem, field="num_embeddings", value=num_embeddings)


def fit_codebook(
    tokenizer: Tokenizer, latents: Float[np.ndarray, "B h w C"], num_embeddings: int, depth: int = 1, seed: int = 0
) -> tuple[Tokenizer, dict[str, float]]:
    """Returns a tokenizer with the encoder and the decoder of another one and a codebook by k-means of latents.

    Args:
      tokenizer: a continuous autoencoder, or a tokenizer whose codebook is replaced.
      latents: of `encode_latents`.
      num_embeddings: size of the codebook.
      depth: number of codes per latent; several levels each quantize what the levels before left.
      seed: of the first seeds of k-means.

    Returns:
      The tokenizer, and the use of its codebook and its quantization error on these latents.

    Raises:
      DataError: there are fewer latents than embeddings, or the tokenizer has no config.
    """
    if tokenizer.config is None:
        raise DataError("a tokenizer without a config cannot be changed: pass config=, or load it from its folder")
    count = len(latents) * (tokenizer.module.decoder.tokens or latents[0].size // latents.shape[-1])
    check_count(num_embeddings, count, len(latents))
    changes = {
        "quantizer": "ema" if depth == 1 else "residual",
        "quantizer_params": QuantizerParams() if depth == 1 else QuantizerParams(depth=depth),
        "num_embeddings": num_embeddings, "codebook_init": "kmeans", "noise_tau": 0.0,
        "resampler_nested": tokenizer.config.resampler_nested and depth == 1,
    }  # fmt: skip
    config, trained = tokenizer.config.model_copy(update=changes), tokenizer.trained
    statistics = jax.device_get(trained["batch_stats"].get("latent", {}))
    built = build_tokenizer(config, latent_stats=statistics, weights=False, mesh=tokenizer.mesh)
    key = jax.random.key(seed)
    fresh = initial_variables(built, key, ["quantizer"], lambda tree: leaf_shardings(tree, tokenizer.mesh))
    if learned := trained["params"].get("quantizer"):
        fresh["params"]["quantizer"] = _keep_maps(fresh["params"].get("quantizer", {}), learned)
    state, metrics = start_quantizer(built.module, fresh, latents, key, encoded=True)
    metrics = jax.device_get(metrics)
    params = {name: trained["params"][name] for name in ("encoder", "decoder")} | fresh["params"]
    provenance = {n: x for n, x in tokenizer.provenance.items() if n not in ("step", "metrics", "protocol")}
    provenance["codebook"] = f"k-means of {count} latents of {len(latents)} images"
    fitted = Tokenizer(
        built.module, {"params": params, "batch_stats": state["batch_stats"]}, config, frozen=tokenizer.frozen,
        provenance=provenance, mesh=tokenizer.mesh, fit=tokenizer.fit, output=tokenizer.output,
        encoder_dtype=tokenizer.encoder_dtype,
    )  # fmt: skip
    error = float(metrics["quantization_error"])
    return fitted, codebook_health.health(metrics["counts"]) | {"quantization_error": error}


def _keep_maps(fresh: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Returns fresh parameters of a quantizer with the learned maps that are in front of it in `trained`."""
    maps = {name: trained[name] for name in ("fusion", "queries") if name in trained}
    inner = trained.get("quantizer")
    if inner and (inside := _keep_maps(fresh.get("quantizer", {}), inner)):
        maps["quantizer"] = inside
    return fresh | maps
