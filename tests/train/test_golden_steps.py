"""Three optimizer steps equal those of the PyTorch VQRAE."""

import json
from functools import reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import config
from vqrae_jax.build.tokenizer import variable_shapes
from vqrae_jax.pretrained import convert, tables
from vqrae_jax.train.tokenizer import TokenizerTask

CASES = ["origin_start", "warm_clip_sched"]
LEAVES = {  # name in the PyTorch VQRAE -> our path, and the function that maps ours to its layout
    "decoder_pred.weight": (("pred", "kernel"), np.transpose),
    "decoder_embed.weight": (("embed", "kernel"), np.transpose),
    "decoder_pos_embed": (("pos_embed",), np.asarray),
    "trainable_cls_token": (("cls",), np.asarray),
}
TOLERANCE = {"final__": 4e-6, "ema_final__": 1e-6}  # absolute: 2 % of a step, three times the numerical noise
METRICS = {"loss/pixel": "rec_loss", "loss/vq": "vq_loss", "loss/total": "total_loss", "learning_rate": "lr",
           "grad_norm": "grad_norm"}  # fmt: skip
STATE = {"codebook": "embedding", "counts": "ema_cluster_size", "sums": "ema_w"}


def build(golden, case, mesh):
    """Returns the task with the settings of the PyTorch VQRAE, its initial state, and the recorded arrays."""
    folder = golden / "train_steps"
    params = json.loads((folder / "params.json").read_text())["params"]
    settings = json.loads((folder / f"{case}_summary.json").read_text())["config"]
    scheduler = settings["training"].get("scheduler", {})
    same = {name: params[name] for name in ("encoder_input_size", "decoder_patch_size", "num_embeddings")}
    paths = {name: str(golden / params[name]) for name in ("encoder_config_path", "decoder_config_path")}
    start = {"codebook_init": "normal", "revival_threshold": 0.0, "quantizer_params": {"decay_warmup": False}}
    sections = {
        "model": {**same, **paths, **start, "decoder_train_pos_embed": True},
        "data": {"image_size": 32, "batch_size": 4},
        "optimizer": {
            "learning_rate": settings["training"]["optimizer"]["lr"],
            "schedule": scheduler.get("type", "constant"),
            "warmup_steps": scheduler.get("warmup_steps", 0),
            "decay_end_steps": scheduler.get("decay_end_steps"),
            "final_learning_rate": scheduler.get("final_lr", 0.0),
            "clip_norm": settings["training"]["clip_grad"] or 0.0,
            "ema_decay": settings["ema_decay"],
            "ema_warmup": False,
        },
    }
    task = TokenizerTask.build(config.from_dict(config.Config, sections), mesh)
    start, recorded = np.load(folder / "init.npz"), np.load(folder / f"{case}.npz")
    names = {n.removeprefix("decoder."): start[n] for n in start.files if n.startswith("decoder.")}
    decoder = convert.convert(names, tables.DECODER_TABLE, variable_shapes(task.built)["params"]["decoder"])
    state, frozen = task.init(), task.frozen()
    source, prefix = (recorded, "warm_") if case.startswith("warm") else (start, "quantizer.")
    quantizer = state.batch_stats["quantizer"] | {ours: source[prefix + theirs] for ours, theirs in STATE.items()}
    params, stats = jax.tree.map(jnp.asarray, ({"decoder": decoder}, {"quantizer": quantizer}))
    state = state.replace(params=params, ema_params=params, batch_stats=stats)
    return task, state, frozen, recorded


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in CASES[1:])])
def test_steps_equal_pytorch(golden, assert_close, case, one_mesh):
    task, state, frozen, recorded = build(golden, case, one_mesh)
    images = np.load(golden / "train_steps" / "batches.npz")["images"]
    start = state
    grads, *_ = jax.jit(task.gradients)(state, frozen, images[0], jax.random.key(0), state.batch_stats)
    step = jax.jit(task.step)
    for i, batch in enumerate(np.round(images * 255).astype(np.uint8)):
        state, metrics = step(state, frozen, {"image": batch}, 100)
        for ours, theirs in METRICS.items():
            assert_close(metrics[ours], recorded[theirs][i], 1e-5, f"{ours} of step {i}")
        counts = np.bincount(recorded["indices"][i].ravel(), minlength=len(metrics["counts"]))
        np.testing.assert_array_equal(metrics["counts"], counts)
    for name, (path, convert_layout) in LEAVES.items():
        gradient = convert_layout(reduce(getitem, path, grads["decoder"]))
        assert_close(gradient, recorded[f"grad_step0__{name}"], 1e-5, f"gradient of {name}")
        # Compares changes, not weights: three steps change them little.
        for ours, theirs in ((state.params, "final__"), (state.ema_params, "ema_final__")):
            before = convert_layout(reduce(getitem, path, start.params["decoder"]))
            moved = convert_layout(reduce(getitem, path, ours["decoder"])) - before
            error = np.abs(moved - (recorded[theirs + name] - before)).max()
            assert error <= TOLERANCE[theirs], f"{theirs}{name}: {error:.1e}"
    for ours, theirs in STATE.items():
        assert_close(state.batch_stats["quantizer"][ours], recorded[f"final_codebook__{theirs}"], 1e-5, ours)
