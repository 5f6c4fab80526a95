"""Trained models saved as folders: config.json and model.safetensors, read by `Tokenizer.load`.

A frozen pretrained encoder is not in the folder unless it is embedded: config.json has its source and the content hash
that it must have. It also has the SHA-256 of both files, which are compared before they are used. Folders do not
contain paths of the machine that wrote them, except that of an encoder in a local folder, with a warning.
"""

import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import __version__, storage
from vqrae_jax.build.encoder import inline_encoder, weights_source
from vqrae_jax.build.tokenizer import build_tokenizer, inline_decoder, variable_shapes
from vqrae_jax.config import Config, GeneratorConfig, ModelConfig, from_saved
from vqrae_jax.errors import StorageError, WeightsError
from vqrae_jax.inference import pytorch_checkpoint
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import diffusers_rae, readers, sources, writers

log = logging.getLogger(__name__)

FORMAT, GENERATOR = "vqrae_jax", "vqrae_jax generator"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELDS = {"format", "version", "model", "encoder", "generator", "classes", "provenance", "sha256"}  # of config.json
FIELD = "checkpoint"  # what names the folder, in messages
USE_GENERATOR = "sample it with `vqrae generate` (Generator.load), or pass its tokenizer"
USE_TOKENIZER = "use it with `vqrae reconstruct` (Tokenizer.load), or pass a generator"
_FOLDERS = re.compile(r"(?<![\w.~:/])(\w+:/|~|\.{1,2})?/([^\s'\"/]+/)*(?=[^\s'\"/])")  # of a path or address


def save_folder(
    folder: pathlib.Path, config: ModelConfig, variables: Any, frozen: bool, provenance: dict[str, Any] | None = None
) -> pathlib.Path:
    """Writes a model to a local folder, which is created if it is missing, and returns the folder.

    Args:
      folder, config: the local folder, and the model section.
      variables: {"params", "batch_stats"} of the whole model.
      frozen: whether to leave out the encoder, because it is the pretrained one that the config names.
      provenance: values for config.json: where the model comes from, its metrics.
    """
    _create_folder(folder)
    params, encoder, source = dict(variables["params"]), None, weights_source(config)[0]
    provenance = {"version": __version__} | (provenance or {})
    if frozen and source is not None:
        encoder = {"source": source, "sha256": writers.content_hash(params.pop("encoder"))}
        if local_encoder(config):
            log.warning(
                "the saved folder refers to the encoder in %s: save it with embed_encoder=True (`vqrae export "
                "--embed-encoder`) for other machines, or name the encoder there by encoder= (--encoder)", source,
            )  # fmt: skip
    elif source is not None:
        config, provenance["encoder"] = inline_encoder(config), source
    # The decoder's weights and the statistics are in the folder.
    absent = dict.fromkeys(("pretrained_decoder_path", "normalization_stat_path"))
    config = inline_decoder(config.model_copy(update=absent))
    content = {
        "format": FORMAT,
        "version": __version__,
        "model": config.model_dump(mode="json"),
        "encoder": encoder,
        "provenance": remove_folders(provenance),
    }
    _write_files(folder, content, {"params": params, "batch_stats": variables["batch_stats"]})
    return folder


def save_generator(
    folder: pathlib.Path, config: GeneratorConfig, variables: Any, classes: Sequence[str] | None,
    provenance: dict[str, Any],
) -> None:  # fmt: skip
    """Writes a generator to a local folder, which is created if it is missing; its tokenizer is only named."""
    _create_folder(folder)
    content = {"format": GENERATOR, "version": __version__, "generator": config.model_dump(mode="json")}
    content |= {"classes": classes and list(classes), "provenance": remove_folders(provenance)}
    _write_files(folder, content, variables)


def _create_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        message = "is a file, or in one; expected a folder, which is created if it is missing"
        raise StorageError(message, field="folder", value=str(folder)) from None


def is_generator(folder: pathlib.Path) -> bool:
    """Returns whether a saved folder has a generator."""
    return readers.read_json(folder / CONFIG, FIELD).get("format") == GENERATOR


def read_generator(folder: pathlib.Path) -> tuple[GeneratorConfig, tuple[str, ...] | None, dict[str, Any]]:
    """Reads the config.json of `save_generator`; returns config, names of classes and provenance."""
    content = _read_config(folder)
    if content.get("format") != GENERATOR:
        raise WeightsError(f"is a tokenizer: {USE_TOKENIZER}", field=FIELD, value=str(folder))
    config, classes = from_saved(Config, {"generator": content.get("generator")}).generator, content.get("classes")
    provenance = {"version": content.get("version")} | (content.get("provenance") or {})
    return config, None if classes is None else tuple(map(str, classes)), provenance


def _write_files(folder: pathlib.Path, content: dict[str, Any], variables: Any) -> None:
    writers.write_safetensors(variables, folder / WEIGHTS)
    content["sha256"] = {WEIGHTS: storage.hash_file(folder / WEIGHTS), CONFIG: _digest(content)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def local_encoder(config: ModelConfig) -> str | None:
    """Returns the source of the encoder's weights if it is not the hub, so that other machines do not have it."""
    source = weights_source(config)[0]
    return source if source is not None and not sources.is_hub_id(source) else None


def remove_folders(value: Any) -> Any:
    """Removes the folders of local paths and bucket addresses from the strings in JSON values; names of files stay."""
    if isinstance(value, dict):
        return {name: remove_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [remove_folders(item) for item in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def is_saved_folder(folder: pathlib.Path) -> bool:
    """Returns whether `save_folder` wrote this folder, or diffusers: an AutoencoderRAE is a saved tokenizer too."""
    if not (folder / CONFIG).is_file():
        return False
    content = readers.read_json(folder / CONFIG, FIELD)
    return content.get("format") in (FORMAT, GENERATOR) or diffusers_rae.is_autoencoder(content)


def read_description(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, str] | None, dict[str, Any]]:
    """Reads config.json; raises WeightsError if it is damaged or from another program.

    Returns:
      The model section, "source" and "sha256" of a pretrained encoder that is not in the folder, and the provenance.
    """
    content = _read_config(folder)
    if diffusers_rae.is_autoencoder(content):
        version = content.get("_diffusers_version")
        return pytorch_checkpoint.describe_diffusers(folder, FIELD), None, {"diffusers": version}
    if content.get("format") == GENERATOR:
        raise WeightsError(f"is a generator: {USE_GENERATOR}", field=FIELD, value=str(folder))
    encoder = content.get("encoder")
    complete = encoder is None or (isinstance(encoder, dict) and {"source", "sha256"} <= set(encoder))
    if content.get("format") != FORMAT or not isinstance(content.get("model"), dict) or not complete:
        raise WeightsError(f"{folder / CONFIG} is not the config of a saved {FORMAT} model", field=FIELD)
    provenance = {"version": content.get("version")} | (content.get("provenance") or {})
    return from_saved(ModelConfig, content["model"]), encoder, provenance


def check_encoder(folder: pathlib.Path, config: ModelConfig, params: Any) -> None:
    """Raises WeightsError if the folder has the hash of another frozen encoder than `params`, which `config` names."""
    encoder = read_description(folder)[1]
    if encoder is not None and (digest := writers.content_hash(params)) != encoder["sha256"]:
        raise WeightsError(
            f"{folder} was trained with an encoder of {encoder['source']} that had the content hash "
            f"{encoder['sha256']}, but that of {weights_source(config)[0]} is {digest}, so its codes would have "
            "another meaning; name the original weights by encoder= (--encoder)",
            field=FIELD,
        )


def load_folder(
    folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> tuple[VQRAE, dict[str, Any]]:
    """Returns the module, built for `mesh`, and its variables as numpy arrays; checks the encoder's content hash.

    `config` is that of `read_description`, or one that names another source of the same encoder.
    """
    encoder = read_description(folder)[1]
    tensors = read_weights(folder)
    variables = unflatten_dict({name: np.asarray(tensors[name]) for name in tensors}, sep="/")
    variables = {"params": {}, "batch_stats": {}} | variables
    stats = variables["batch_stats"].get("latent", {})
    built = build_tokenizer(config, latent_stats=stats, weights=encoder is not None, mesh=mesh)
    if encoder is not None:
        variables["params"]["encoder"] = built.pretrained["encoder"]
        check_encoder(folder, config, built.pretrained["encoder"])
    shapes, expected = (
        {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (variables, variable_shapes(built))
    )
    if names := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
        listed = ", ".join(
            f"{n} ({shapes.get(n, 'missing')} in the file, {expected.get(n, 'nothing')} expected)" for n in names[:8]
        )
        raise WeightsError(
            f"{folder / WEIGHTS} does not match its {CONFIG} in {len(names)} tensors: {listed}", field=FIELD
        )
    return built.module, variables


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    content = readers.read_json(folder / CONFIG, FIELD)
    if diffusers_rae.is_autoencoder(content):
        return content
    if unknown := sorted(content.keys() - FIELDS):
        problem = f"has unknown fields ({', '.join(unknown)}): it is damaged or of a newer version"
        raise WeightsError(f"{folder / CONFIG} {problem}", field=FIELD)
    digests = content.get("sha256", {CONFIG: _digest(content)})
    if not isinstance(digests, dict) or digests.get(CONFIG) != _digest(content):
        raise WeightsError(
            f"{folder / CONFIG} is not the file that was saved; copy the folder again, or remove sha256 from the file "
            "if it was edited on purpose",
            field=FIELD,
        )
    return content


def read_weights(folder: pathlib.Path) -> readers.Tensors:
    """Returns the tensors of the folder by their paths; they are compared with its SHA-256 first."""
    content, file = _read_config(folder), folder / WEIGHTS
    if diffusers_rae.is_autoencoder(content):
        return flatten_dict(pytorch_checkpoint.convert_diffusers(folder, FIELD), sep="/")
    digests = content.get("sha256")
    if digests is None:
        log.warning("%s cannot be checked for damage: it was saved by a version that wrote no digests", folder)
    elif file.is_file() and storage.hash_file(file) != digests.get(WEIGHTS):
        raise WeightsError(f"{file} is damaged: it is not the file that was saved; copy the folder again", field=FIELD)
    return readers.read_tensors(file, FIELD)


def _digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of all fields but "sha256", as they are after a round trip through JSON."""
    fields = json.loads(json.dumps({name: value for name, value in content.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
