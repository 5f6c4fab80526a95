"""Three optimizer steps of the PyTorch VQRAE's YAML files equal those of its program."""

import json
from functools import reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import variable_shapes
from vqrae_jax.config.pytorch_yaml import read_pytorch_yaml
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


def build(golden, case, mesh, tmp_path):
    """Returns the task of the PyTorch VQRAE's YAML file, its initial state, and the recorded arrays."""
    folder = golden / "train_steps"
    described = json.loads((folder / "params.json").read_text())
    settings = json.loads((folder / f"{case}_summary.json").read_text())["config"]
    paths = {name: str(golden / described["params"][name]) for name in ("encoder_config_path", "decoder_config_path")}
    paths["encoder_params"] = {"dinov2_path": paths["encoder_config_path"]}
    training = settings["training"] | {"ema_decay": settings["ema_decay"], "batch_size": 4}
    content = {"stage_1": {"target": "stage1.VQRAE", "params": described["params"] | paths}, "training": training}
    (tmp_path / "theirs.yaml").write_text(json.dumps(content))
    config = read_pytorch_yaml(tmp_path / "theirs.yaml", "--config").config
    data = config.data.model_copy(update={"image_size": described["image_size"]})
    task = TokenizerTask.build(config.model_copy(update={"data": data}), mesh)
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
def test_steps_equal_pytorch(golden, assert_close, case, one_mesh, tmp_path):
    task, state, frozen, recorded = build(golden, case, one_mesh, tmp_path)
    images = np.load(golden / "train_steps" / "batches.npz")["images"]
    start = state
    step = jax.jit(task.step)
    for i, batch in enumerate(np.round(images * 255).astype(np.uint8)):
        state, metrics = step(state, frozen, {"image": batch}, 100)
        for ours, theirs in METRICS.items():
            assert_close(metrics[ours], recorded[theirs][i], 1e-5, f"{ours} of step {i}")
        if i == 0:
            moments, clip = state.opt_state[0].mu, task.config.optimizer.clip_norm
            scale = (1 - task.config.optimizer.b1) * (min(1.0, clip / metrics["grad_norm"]) if clip else 1.0)
        counts = np.bincount(recorded["indices"][i].ravel(), minlength=len(metrics["counts"]))
        np.testing.assert_array_equal(metrics["counts"], counts)
    for name, (path, convert_layout) in LEAVES.items():
        gradient = convert_layout(reduce(getitem, path, moments["decoder"]) / scale)
        assert_close(gradient, recorded[f"grad_step0__{name}"], 1e-5, f"gradient of {name}")
        # Compares changes, not weights: three steps change them little.
        for ours, theirs in ((state.params, "final__"), (state.ema_params, "ema_final__")):
            before = convert_layout(reduce(getitem, path, start.params["decoder"]))
            moved = convert_layout(reduce(getitem, path, ours["decoder"])) - before
            error = np.abs(moved - (recorded[theirs + name] - before)).max()
            assert error <= TOLERANCE[theirs], f"{theirs}{name}: {error:.1e}"
    for ours, theirs in STATE.items():
        assert_close(state.batch_stats["quantizer"][ours], recorded[f"final_codebook__{theirs}"], 1e-5, ours)
