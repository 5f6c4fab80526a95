import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import Tokenizer, checkpoint, sharding
from vqrae_jax.data import codes, pipeline
from vqrae_jax.data.code_shards import Columns
from vqrae_jax.data.code_source import CodeSource
from vqrae_jax.data.images import read_image, write_image
from vqrae_jax.errors import NO_VALUE, CheckpointError, ConfigError, DataError
from vqrae_jax.train import loop, sample_evaluation
from vqrae_jax.train import run as opening
from vqrae_jax.train.generator import FrozenTokenizer, GeneratorTask, complete_config
from vqrae_jax.train.run import open_run
from vqrae_jax.train.task import jit_step, place_horizon

SHAPE = {"grids": ((4, 4),), "levels": 1, "num_embeddings": 32, "classes": 2}
RICH = {"adaln": True, "pos": "rope", "factors": (8, 4), "registers": 1, "gated": True, "dropout": 0.1}


def batches(count=3):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 32, (count, 16, 4, 4)).astype(np.int32)
    return [{"codes": x, "label": np.arange(16, dtype=np.int32) % 2} for x in codes]


@functools.cache
def train(build, family, mesh=(), **fields):
    """Returns losses, and the gradients of the first step, all scaled alike."""
    devices = dict(mesh) or {"data": 1}
    config = build(mesh=devices, generator={**SHAPE, **RICH, "tokenizer": None, "family": family, **fields})
    task = GeneratorTask.build(
        config, sharding.make_mesh(config.mesh.data, config.mesh.model, jax.devices()[: 8 if mesh else 1])
    )
    state, step, losses, grads = task.init(), jit_step(task, task.mesh), [], None
    for batch in batches():
        placed = sharding.place_batch(batch, task.mesh)
        state, metrics = step(state, {}, placed, place_horizon(3, task.mesh))
        losses.append(metrics["loss/total"])
        grads = jax.device_get(state.opt_state[0].mu) if grads is None else grads
    return jax.device_get((losses, grads))


FSDP = (("data", 4), ("model", 2), ("fsdp", True), ("fsdp_min_size", 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_eight_devices_equal_one(tiny_generator, family):
    one, eight = (train(tiny_generator, family, mesh) for mesh in ((), FSDP))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(one[1]))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(eight[1]), jax.tree.leaves(one[1]), strict=True):
        scale = max(np.abs(theirs).max(), 1e-3 * largest)  # key biases have no gradient
        assert np.abs(ours - theirs).max() <= 1e-5 * scale, jax.tree_util.keystr(path)


def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_generator, trained_generator, tmp_path, one_device, assert_same
):
    shutil.copytree(trained_generator / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    loop.train(tiny_generator(), tmp_path, one_device)
    folders = [checkpoint.find_checkpoint(workdir) for workdir in (trained_generator, tmp_path)]
    whole, resumed = (checkpoint.read_model(f, checkpoint.saved_shapes(f)) for f in folders)
    assert_same(resumed, whole)
    positions = [json.loads((f / "data" / "metadata").read_text())["images"] for f in folders]
    assert positions[0] == positions[1] == 32
    assert read_image(trained_generator / "samples.png").ndim == 3


def test_the_checkpoint_has_what_its_codes_are(trained_generator, code_folders):
    config = checkpoint.read_meta(checkpoint.find_checkpoint(trained_generator))["config"]["generator"]
    plan = codes.Codes(code_folders["train"]).plan
    assert config["tokenizer_hash"] == plan.tokenizer
    assert {name: config[name] for name in SHAPE} == {**SHAPE, "grids": [[4, 4]]}


@pytest.mark.slow
def test_images_train_by_the_codes_of_the_frozen_tokenizer(tiny_generator, trained, tmp_path, one_device):
    """The step learns the codes that the tokenizer gives the images of its batch."""
    from vqrae_jax import Tokenizer

    rng = np.random.default_rng(0)
    for i in range(8):
        write_image(tmp_path / f"{'ab'[i % 2]}" / f"{i}.png", rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
    data = {"source": "folder", "path": str(tmp_path), "image_size": 32, "crop": "center", "flip": False}
    with open_run(tiny_generator(data={**data, "eval_path": None}), tmp_path / "run", one_device) as (run, _):
        assert run.config.generator.classes == 2
        batch = next(run.batches)
        placed = sharding.place_batch({name: batch[name] for name in run.task.inputs}, run.mesh)
        codes = jax.jit(run.task._codes)(run.frozen, placed)
    expected = Tokenizer.load(trained).encode_to_indices(batch["image"])
    np.testing.assert_array_equal(codes, expected.reshape(8, -1))


def write_codes(folder, grids, labels=None, tokenizer="0" * 64, size=32, arrangement=()):
    labels = np.zeros(len(grids), np.int32) if labels is None else labels
    plan = codes.Plan(tokenizer, "x", len(grids), "one", grids.shape[1:], "uint16", size, 32, "npz", 4096)
    plan = dataclasses.replace(plan, grids=arrangement)
    codes.start_dataset(folder, plan)
    columns = Columns(np.arange(len(grids)), ["x"] * len(grids), labels, grids.astype(np.uint16))
    codes.write_shard(folder, plan, 0, columns)
    codes.finish_dataset(folder, plan)
    return str(folder)


def test_codes_of_another_tokenizer_and_images_without_a_class_are_refused(tiny_generator, tmp_path):
    grids = np.zeros((8, 4, 4))
    other = write_codes(tmp_path / "other", grids)
    with (
        pytest.raises(ConfigError) as error,
        open_run(tiny_generator(data={"path": other, "eval_path": None}), tmp_path),
    ):
        pass
    assert error.value.field == "generator.tokenizer"
    labels = np.array([-1] + [0] * 7, np.int32)
    unlabelled = write_codes(tmp_path / "unlabelled", grids, labels)
    alone = {"tokenizer": None, "classes": 1}
    config = tiny_generator(data={"path": unlabelled, "eval_path": None}, generator=alone)
    with pytest.raises(DataError) as error, open_run(config, tmp_path):
        pass
    assert error.value.field == "data.path"
    nothing = write_codes(tmp_path / "nothing", grids, np.full(8, -1, np.int32))
    config = tiny_generator(data={"path": nothing, "eval_path": unlabelled}, generator={"tokenizer": None})
    with pytest.raises(DataError) as error, open_run(config, tmp_path):
        pass
    assert error.value.field == "data.path"
    labelled = write_codes(tmp_path / "labelled", grids)  # by class 0, so that label 1 of the validation codes is new
    validation = write_codes(tmp_path / "validation", grids, np.ones(8, np.int32))
    config = tiny_generator(data={"path": labelled, "eval_path": validation}, generator=alone)
    with pytest.raises(DataError) as error, open_run(config, tmp_path):
        pass
    assert error.value.field == "data.eval_path"


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"generator": {"num_embeddings": 64}}, "generator.num_embeddings"),
        ({"generator": {"grids": ((2, 8),)}}, "generator.grids"),
        ({"generator": {"sampler": {"top_k": 5}}}, "generator.sampler.top_k"),
        ({"generator": {"classes": 0, "sampler": {"guidance": 1.0}}}, "generator.sampler.guidance"),
        ({"generator": {"factors": (4, 4)}}, "generator.factors"),
        ({"generator": {"class_token": False}}, "generator.class_token"),
        ({"generator": {"permuted_steps": 2}}, "generator.raster_steps"),
        ({"generator": {"permuted_epochs": 2.0, "raster_epochs": 1.0}}, "generator.raster_epochs"),
        ({"data": {"source": "photographs", "path": None, "eval_path": None, "image_size": 64}}, "data.image_size"),
        ({"generator": {"tokenizer": "nowhere"}}, "generator.tokenizer"),
        ({"data": {"source": "folder"}, "generator": {"tokenizer": None}}, "generator.tokenizer"),
        ({"train": {"task": "tokenizer"}}, "data.source"),
        ({"train": {"start_from": "x"}}, "train.start_from"),
        ({"evaluation": {"training_metrics": ("encoder",)}}, "evaluation.training_metrics"),
        ({"evaluation": {"metrics": ("lpips",)}}, "evaluation.metrics"),
        ({"generator": {"max_snr": 5.0}}, "generator.max_snr"),
        ({"generator": {"raster_steps": 5}}, "generator.raster_steps"),
        ({"generator": {"code_channels": 4}}, "generator.code_channels"),
        ({"generator": {"tokenizer": ""}}, "generator.tokenizer"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_compiles(tiny_generator, tmp_path, sections, field):
    with (
        pytest.raises(ConfigError if "nowhere" not in str(sections) else Exception) as error,
        open_run(tiny_generator(**sections), tmp_path),
    ):
        pass
    assert error.value.field == field


@pytest.mark.slow
def test_a_workdir_of_another_model_is_refused_without_advice_to_start_from_it(
    tiny, tiny_generator, trained, trained_generator, tmp_path
):
    wide = {"generator": {"width": 32}}
    for config, workdir in (
        (tiny_generator(), trained), (tiny(), trained_generator), (tiny_generator(**wide), trained_generator)
    ):  # fmt: skip
        shutil.copytree(workdir, tmp_path / "run")
        with pytest.raises(CheckpointError) as error, open_run(config, tmp_path / "run"):
            pass
        assert "start_from" not in str(error.value)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "loss"), [("masked", "mean"), ("masked", "bound"), ("autoregressive", "mean")])
def test_the_bits_of_a_trained_network_reach_the_entropy_of_its_data(
    tiny_generator, tmp_path, one_device, family, loss
):
    """Pairs: the two codes of a row are equal, the rows independent; four codes: 4 bits in 4 codes."""
    rows = np.random.default_rng(0).integers(0, 4, (4096, 2, 1)).repeat(2, axis=2)
    path = write_codes(tmp_path / "pairs", rows, size=4)
    config = tiny_generator(
        generator={"tokenizer": None, "family": family, "loss": loss, "width": 32, "depth": 2, "mlp": 64, "classes": 0},
        data={"path": path, "eval_path": path, "batch_size": 64, "eval_batch_size": 512},
        optimizer={"learning_rate": 3e-3, "final_learning_rate": 0.0},
        train={"steps": 600, "log_every": 100, "evaluate_every": 600, "checkpoint_every": 600},
    )
    metrics = loop.train(config, tmp_path / "run", one_device)
    assert metrics["eval/bits_per_code"] == pytest.approx(1.0, rel=0.02)


@pytest.mark.slow
def test_bits_do_not_depend_on_mesh_or_batch(tiny_generator, trained_generator, one_device):
    bits = []
    for devices, size in ((one_device, 4), (jax.devices(), 8)):
        config = tiny_generator(data={"eval_batch_size": size})
        with open_run(config, trained_generator, devices, evaluate_step=4) as (run, state):
            result = run.evaluator.evaluate(state.inference(), run.frozen)
            bits.append(result.metrics["eval/bits_per_code"])
    # Which codes are hidden depends on the batch; the bound is estimated at evenly spread times.
    assert bits[0] == pytest.approx(bits[1], rel=0.05)


def test_every_image_is_seen_once_in_an_epoch_by_several_processes(tiny_generator):
    data = tiny_generator().data
    parts = [pipeline.train_batches(data, seed=0, process_index=i, process_count=2) for i in range(2)]
    labels = [np.concatenate([next(part)["label"] for part in parts]) for _ in range(6)]
    assert np.bincount(np.concatenate(labels)).tolist() == [24, 24]


@pytest.mark.parametrize("name", ["guidances", "sampler_steps"])
def test_settings_that_no_metric_compares_are_refused(tiny_generator, trained_generator, one_device, name):
    with pytest.raises(ConfigError) as error:
        loop.evaluate(tiny_generator(evaluation={name: (1, 2)}), trained_generator, one_device)
    assert error.value.field == f"evaluation.{name}"


def test_autoregression_has_no_numbers_of_steps_to_compare(tiny_generator, trained_generator, one_device):
    config = tiny_generator(generator={"family": "autoregressive"}, evaluation={"sampler_steps": (1, 2)})
    with pytest.raises(ConfigError, match="autoregression") as error:
        loop.evaluate(config, trained_generator, one_device)
    assert error.value.field == "evaluation.sampler_steps"


def test_sources_that_disagree_are_named(tiny_generator, trained_generator, tmp_path):
    """The tokenizer has 32 codes, which no field has set; images train, and a checkpoint has another tokenizer."""
    config, tokenizer = tiny_generator(), FrozenTokenizer.load(tiny_generator().generator.tokenizer)
    source = CodeSource(write_codes(tmp_path / "codes", np.zeros((8, 4, 4)), tokenizer=tokenizer.hash, size=64))
    with pytest.raises(ConfigError) as error:
        complete_config(config, {}, tokenizer, source)
    assert (error.value.field, error.value.value) == ("generator.num_embeddings", NO_VALUE)
    images = tiny_generator(data={"source": "photographs", "path": None, "eval_path": None, "image_size": 32})
    with pytest.raises(ConfigError) as error:
        complete_config(images, {"tokenizer_hash": "0" * 64}, tokenizer, None)
    assert error.value.field == "generator.tokenizer"


def test_codes_of_free_tokens_are_one_row_with_and_without_the_tokenizer(tiny_generator, untrained, tmp_path):
    """Codes of a manifest without grids are a square; a run may name the tokenizer when it is resumed."""
    model, rows = untrained(resampler_tokens=16), np.zeros((8, 16))
    shape, size = model.code_shape, model.codebook_size
    tokenizer = FrozenTokenizer(model.module, model.variables, model.hash, shape, model.image_size)
    config = tiny_generator(generator={"tokenizer": None})
    for folder, arrangement, expected in (("earlier", (), (4, 4)), ("codes", ((1, 16),), (1, 16))):
        source = CodeSource(write_codes(tmp_path / folder, rows, None, model.hash, size, arrangement))
        alone = complete_config(config, {}, None, source).generator
        assert (alone.grids, alone.levels) == ((expected,), 1)
    resumed = complete_config(config, alone.model_dump(), tokenizer, source).generator
    assert (resumed.grids, resumed.levels) == (((1, 16),), 1)
    squares = tiny_generator(generator={"tokenizer": None, "grids": ((4, 4),)})
    with pytest.raises(ConfigError) as error:
        complete_config(squares, {}, None, source)
    assert (error.value.field, error.value.value) == ("generator.grids", ((4, 4),))


def test_a_set_arrangement_must_be_that_of_the_codes(tiny_generator, tmp_path):
    fixed = tiny_generator(generator={"tokenizer": None, "grids": ((4, 4),), "levels": 1})
    for folder, arrangement, field in (("earlier", (), "grids"), ("codes", ((4, 4),), "levels")):
        path = write_codes(tmp_path / folder, np.zeros((8, 4, 4, 2)), arrangement=arrangement)
        with pytest.raises(ConfigError) as error:
            complete_config(fixed, {}, None, CodeSource(path))
        assert error.value.field == f"generator.{field}"


def test_a_checkpoint_of_codes_in_bfloat16_needs_no_codes(trained, tiny_generator, one_mesh, tmp_path, monkeypatch):
    """As evaluation of samples: its tokenizer is the one that encodes in bfloat16."""
    made_by, read = Tokenizer.load(trained, encoder_dtype="bfloat16").hash, checkpoint.read_meta
    saved = {"config": {"generator": {"tokenizer_hash": made_by}}}
    monkeypatch.setattr(checkpoint, "read_meta", lambda path: saved if path.parent == tmp_path else read(path))
    config = tiny_generator(data={"eval_path": None})
    _, task = opening._build_generator(config, one_mesh, tmp_path, 1, None)
    assert task.tokenizer.hash == made_by


@pytest.mark.slow
def test_evaluation_compares_samples_at_several_settings(
    tiny_generator, trained_generator, golden, tmp_path, one_device
):
    """The report has the settings and their plot; samples that exist are not sampled again."""
    for i in range(8):
        write_image(tmp_path / "reference" / f"{i}.png", np.full((32, 32, 3), 30 * i, np.uint8))
    encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
    evaluation = {"metrics": ("encoder",), "samples": 8, "sampler_steps": (1, 2), **encoder}
    config = tiny_generator(evaluation={**evaluation, "encoder_reference": str(tmp_path / "reference")})
    workdir = shutil.copytree(trained_generator, tmp_path / "run")
    metrics = loop.evaluate(config, workdir, one_device)
    report = json.loads((workdir / "evaluation.json").read_text())
    assert {"step": report["step"], **report["metrics"]} == metrics
    assert metrics["eval/encoder_fd"] == min(row["eval/encoder_fd"] for row in report["settings"])
    assert report["samples"]["fid"] == "FID of 8 samples, not FID-50k"
    assert [row["steps"] for row in report["settings"]] == [1, 2]
    assert (workdir / "evaluation" / "picture1.png").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_evaluation.Generator, "stream_codes", lambda *_: pytest.fail("sampled again"))
        assert loop.evaluate(config, workdir, one_device) == metrics
    sampler = config.generator.sampler.model_copy(update={"temperature": 0.5})
    generator = config.generator.model_copy(update={"sampler": sampler})
    other = loop.evaluate(config.model_copy(update={"generator": generator}), workdir, one_device)
    assert other["eval/encoder_fd"] != metrics["eval/encoder_fd"]  # samples of their own
