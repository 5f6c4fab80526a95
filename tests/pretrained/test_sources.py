import json
import pathlib
import shutil
import tracemalloc

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from vqrae_jax import hub
from vqrae_jax.build.tokenizer import build_tokenizer, initial_params
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import StorageError, WeightsError
from vqrae_jax.pretrained import convert, families, sources
from vqrae_jax.sharding import make_mesh, shardings

CASES = ["dinov2_with_registers", "dinov3", "siglip", "vit_mae"]
REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "real"


def read(folder, case, golden, **params):
    described = json.loads((golden / "encoders" / case / "params.json").read_text())
    config = ModelConfig(
        encoder_cls=described["encoder_cls"], encoder_config_path=str(folder), encoder_params=params,
        encoder_input_size=described["image_size"], decoder_config_path="ViT-S",
    )  # fmt: skip
    return build_tokenizer(config)


@pytest.fixture
def copy(golden, tmp_path):
    """A hub folder to change."""

    def make(case):
        folder = tmp_path / case
        shutil.copytree(golden / "encoders" / case, folder, ignore=shutil.ignore_patterns("io.npz", "params.json"))
        return folder, safetensors.numpy.load_file(folder / "model.safetensors")

    return make


def write_shards(folder, tensors, count=3):
    names = sorted(tensors)
    files = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: tensors[name] for name in names if files[name] == file}
        safetensors.numpy.save_file(shard, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sorted(set(files.values()))


@pytest.mark.parametrize("case", ["dinov3", "siglip"])
def test_shards_equal_one_file_and_a_missing_shard_is_named(golden, copy, case, assert_same):
    folder, tensors = copy(case)
    shards = write_shards(folder, tensors)
    assert_same(read(folder, case, golden).pretrained, read(golden / "encoders" / case, case, golden).pretrained)
    (folder / shards[1]).unlink()
    with pytest.raises(WeightsError, match=r"encoder_config_path.*model-00002-of-00003\.safetensors"):
        read(folder, case, golden)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_files_are_exact(golden, copy, case, assert_same):
    folder, tensors = copy(case)
    expected = read(golden / "encoders" / case, case, golden).pretrained
    for dtype in (np.float16, ml_dtypes.bfloat16):
        safetensors.numpy.save_file({n: t.astype(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype(np.float32), expected)
        assert_same(read(folder, case, golden).pretrained, rounded)


def test_flax_weights(golden, copy, assert_same):
    folder, tensors = copy("vit_mae")
    (folder / "model.safetensors").unlink()
    tree = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight":
            last = "scale" if tensor.ndim == 1 else "kernel"
            tensor = tensor.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[tensor.ndim])
        tree[(*module.split("."), last) if module else (last,)] = tensor
    content = flax.serialization.msgpack_serialize({"params": unflatten_dict(tree)})
    (folder / "flax_model.msgpack").write_bytes(content)
    expected = read(golden / "encoders" / "vit_mae", "vit_mae", golden).pretrained
    assert_same(read(folder, "vit_mae", golden).pretrained, expected)


def test_hub_configs_leave_defaults_out(golden, copy):
    """SigLIP 2 as on the hub: nested towers and few numbers."""
    folder, _ = copy("siglip")
    vision = {"model_type": "siglip_vision_model", "image_size": 256, "hidden_size": 1024, "intermediate_size": 4096,
              "num_attention_heads": 16, "num_hidden_layers": 24}  # fmt: skip
    config = {"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": vision,
             "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    fields = families.describe(families.FAMILIES["SigLIP2wNorm"], sources.read_config(folder, "field"), "a folder")
    assert (fields["patch"], fields["grid"]) == (16, 16)
    assert (fields["blocks"]["act"], fields["blocks"]["norm_eps"]) == ("gelu_tanh", 1e-6)
    config = {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config))
    fields = families.describe(families.FAMILIES["Dinov2withNorm"], sources.read_config(folder, "field"), "a folder")
    assert fields["blocks"] == {
        "width": 384, "depth": 12, "heads": 6, "mlp": 1536, "act": "gelu", "gated": False, "layer_scale": True,
        "norm_eps": 1e-6, "unbiased": (),
    }  # fmt: skip
    assert fields["grid"] == 37


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for model_type, defaults in families.DEFAULTS.items():
        values = transformers.AutoConfig.for_model(model_type).to_dict()
        if model_type == "dinov3_vit":  # a name of the past, which files on the hub have
            values["rope_parameters"] = {"rope_theta": values["rope_theta"]}
        if model_type == "siglip":
            values, defaults = values["vision_config"], families.DEFAULTS["siglip_vision_model"]
        if model_type.startswith("dinov2"):  # computed from mlp_ratio
            values["intermediate_size"] = defaults["intermediate_size"]
        assert {name: values[name] for name in defaults} == defaults, model_type


@pytest.mark.parametrize(("name", "value"), [("use_swiglu_ffn", "no"), ("layer_norm_eps", None), ("hidden_act", 1)])
def test_values_of_another_type_are_refused(name, value):
    config = {"model_type": "dinov2", name: value}
    with pytest.raises(WeightsError, match=f"a folder.*{name} is {value!r}"):
        families.describe(families.FAMILIES["Dinov2withNorm"], config, "a folder")


def test_vision_tower_alone(golden, copy, assert_same):
    """SiglipVisionModel saves no text tower, and transformers 5 has no `vision_model.` prefix in memory."""
    expected = read(golden / "encoders" / "siglip", "siglip", golden)
    for prefix in ("vision_model.", ""):
        folder, tensors = copy("siglip")
        alone = {n: t for n, t in tensors.items() if n.startswith("vision_model.")}
        alone = {prefix + n.removeprefix("vision_model."): t for n, t in alone.items()}
        safetensors.numpy.save_file(alone, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())["vision_config"]
        (folder / "config.json").write_text(json.dumps(config))
        built = read(folder, "siglip", golden)
        assert_same(built.pretrained, expected.pretrained)
        assert built.module.encoder == expected.module.encoder
        shutil.rmtree(folder)


def test_weights_of_another_family(golden, copy):
    folder, _ = copy("dinov3")
    shutil.copy(golden / "encoders" / "vit_mae" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        read(folder, "dinov3", golden)
    message = str(caught.value)
    for text in (
        str(folder), "MAEwNorm", "vit/block00/attn/key/kernel (and 2 more blocks)", "vit/registers",
        "vit.encoder.layer.0.attention.attention.key.weight (and 2 more blocks)",
    ):  # fmt: skip
        assert text in message
    assert len(message) < 6000


def test_weights_of_another_shape_and_missing_weights(golden, copy):
    folder, tensors = copy("dinov3")
    tensors["layer.1.mlp.up_proj.weight"] = np.zeros((72, 31), np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layer\.1\.mlp\.up_proj\.weight \(\(72, 31\) in the file, \(72, 32\)"):
        read(folder, "dinov3", golden)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"encoder_config_path: .*model\.safetensors"):
        read(folder, "dinov3", golden)


def test_latent_statistics_in_either_layout(golden, tmp_path):
    torch = pytest.importorskip("torch", reason="stat.pt is a PyTorch file")
    var = np.random.default_rng(0).uniform(0.5, 1, (4, 3, 5)).astype(np.float32)
    torch.save({"mean": None, "var": torch.from_numpy(np.moveaxis(var, -1, 0).copy())}, tmp_path / "stat.pt")
    stats = sources.read_latent_statistics(str(tmp_path / "stat.pt"), "field", (4, 3, 5))
    assert set(stats) == {"var"}
    np.testing.assert_array_equal(stats["var"], var)
    torch.save({"mean": 0.5, "var": torch.ones(5, 1, 1)}, tmp_path / "stat.pt")
    stats = sources.read_latent_statistics(str(tmp_path / "stat.pt"), "field", (4, 3, 5))
    assert {name: (value.shape, value[0]) for name, value in stats.items()} == {"mean": ((5,), 0.5), "var": ((5,), 1)}


def test_statistics_of_every_broadcastable_shape():
    """A latent of 4 x 3 positions and 5 channels; PyTorch has the channels in front."""
    rng, latent = np.random.default_rng(0), np.zeros((4, 3, 5))
    torch_order = [(5, 4, 3), (1, 5, 4, 3), (5, 1, 3), (1, 5, 4, 1), (4, 3), (1, 1, 3), (1, 1, 4, 1)]
    for shape in torch_order:
        value = rng.normal(size=shape).astype(np.float32)
        expected = np.moveaxis(np.broadcast_to(value, (1, 5, 4, 3))[0], 0, -1)
        np.testing.assert_array_equal(sources.broadcast_statistics(value, (4, 3, 5), True), expected)
    for shape in [(4, 3, 5), (1, 4, 3, 5), (4, 1, 5), (3, 5), (4, 3, 1)]:
        value = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(
            sources.broadcast_statistics(value, (4, 3, 5), False), latent + value.reshape(shape[-3:])
        )
    for shape in [(), (1,), (1, 1, 1, 1), (5,), (1, 5), (5, 1), (5, 1, 1), (1, 5, 1, 1), (1, 1, 1, 5)]:
        value = rng.normal(size=shape).astype(np.float32)
        for channel_first in (True, False):
            result = sources.broadcast_statistics(value, (4, 3, 5), channel_first)
            np.testing.assert_array_equal(result, np.zeros(5) + value.reshape(-1))
    with pytest.raises(ValueError, match="finite"):
        sources.broadcast_statistics(np.nan, (4, 3, 5), True)
    for shape in [(2, 5), (5, 4, 3, 1), (2, 5, 4, 3), (12, 5), (5, 3, 4), (0,)]:
        with pytest.raises(ValueError, match=r"shape|broadcast"):
            sources.broadcast_statistics(np.zeros(shape), (4, 3, 5), True)


def test_missing_file(tmp_path):
    for name in (str(tmp_path / "none.pt"), "./none.pt", "none.pt", "owner/name"):
        with pytest.raises(WeightsError) as caught:
            sources.fetch_file(name, "the field")
        assert (caught.value.field, caught.value.value) == ("the field", name)
    with pytest.raises(WeightsError, match=r"the field='owner/name/x\.pt'.*hub"):
        sources.fetch_file("owner/name/x.pt", "the field")


@pytest.mark.parametrize("name", ["folder/typo", "folder/typo.pt", "folder/sub/typo.pt", "./none/typo", "~/none/typo"])
def test_missing_local_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the hub is used"))
    with pytest.raises(WeightsError, match="missing local file") as caught:
        sources.read_state_dict(name, "the field")
    assert (caught.value.field, caught.value.value) == ("the field", name)


@pytest.mark.parametrize("cached", [True, False])
def test_cache_is_used_at_once_without_network(tmp_path, monkeypatch, cached):
    """A client of the hub that cannot connect."""
    import huggingface_hub

    def unreachable(self, repository, timeout, **_):
        raise ConnectionError("name not known")

    def download(*_, local_files_only, **__):
        assert local_files_only, "this would try for half a minute"
        if not cached:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, download)
    for fetch, name in ((sources.fetch_folder, "owner/name"), (sources.fetch_file, "owner/name/x.pt")):
        if cached:
            assert fetch(name, "the field") == tmp_path
        else:
            with pytest.raises(WeightsError, match="ConnectionError: name not known"):
                fetch(name, "the field")


CONFIG_FIELDS = ("model_type", "image_size", "patch_size", "num_attention_heads", "num_register_tokens")


def large_encoder(golden, tmp_path, depth=24, width=192):
    """Writes a hub folder of a DINOv3 with ViT-L's depth; returns the folder and its size in bytes."""
    config = json.loads((golden / "encoders" / "dinov3" / "config.json").read_text())
    config = {name: config[name] for name in CONFIG_FIELDS}
    config |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    tensors = safetensors.numpy.load_file(golden / "encoders" / "dinov3" / "model.safetensors")

    def widen(name, tensor):
        sizes = [{32: width, 72: 4 * width}.get(n, n) for n in tensor.shape]
        return np.zeros(sizes, np.float32)

    grown = {n: widen(n, t) for n, t in tensors.items() if not n.startswith("layer.")}
    first = {n: t for n, t in tensors.items() if n.startswith("layer.0.")}
    grown |= {n.replace("layer.0.", f"layer.{i}."): widen(n, t) for n, t in first.items() for i in range(depth)}
    safetensors.numpy.save_file(grown, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(golden / "encoders" / "dinov3" / "preprocessor_config.json", tmp_path)
    return tmp_path, sum(t.nbytes for t in grown.values())


def test_loading_holds_no_more_than_two_copies(golden, tmp_path):
    """A deep encoder, of which the largest tensor is a small part."""
    folder, size = large_encoder(golden, tmp_path)
    tracemalloc.start()
    built = read(folder, "dinov3", golden)
    after = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 3e7
    assert after < 1.25 * size  # the tree, one tensor, one transposed copy of it
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(built.pretrained["encoder"])) <= size


def test_sharded_load_places_no_full_copy_per_device(golden, tmp_path, assert_same):
    folder, size = large_encoder(golden, tmp_path, depth=2)
    built = read(folder, "dinov3", golden)
    mesh = make_mesh(4, 2)
    placed = initial_params(
        built, jax.random.key(0), ["encoder"], lambda tree: shardings(tree, mesh=mesh, fsdp=True, fsdp_min_size=1)
    )
    per_device = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(placed):
        for shard in leaf.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    assert max(per_device.values()) < 0.2 * size
    assert_same(jax.device_get(placed["encoder"]), built.pretrained["encoder"])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real weights are not at {REAL}")
def test_real_vit_tiny_equals_pytorch(assert_close):
    """A trained network, from a float16 file."""
    folder = REAL / "vit-tiny-patch16-224"
    io = np.load(folder / "io.npz")
    images = io["images_uint8"].astype(np.float32) / 255
    for normalize, expected in ((True, io["features"]), (False, io["features_affine"])):
        config = ModelConfig(
            encoder_config_path=str(folder), encoder_params={"normalize": normalize}, decoder_config_path="ViT-S"
        )
        built = build_tokenizer(config)
        features = jax.jit(built.module.encoder.apply)({"params": built.pretrained["encoder"]}, images)
        assert_close(np.asarray(features).reshape(expected.shape), expected, 1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real files are not at {REAL}")
def test_real_latent_statistics():
    pytest.importorskip("torch", reason="stat.pt is a PyTorch file")
    stats = sources.read_latent_statistics(str(REAL / "rae_dinov2_base_stat.pt"), "field", (16, 16, 768))
    assert {name: value.shape for name, value in stats.items()} == {"var": (16, 16, 768)}


def test_names_of_both_versions_of_transformers(golden, assert_same):
    """SwiGLU is one fused tensor on disk, and three in the memory of transformers 5."""
    case = "dinov2_with_registers_swiglu"
    built = read(golden / "encoders" / case, case, golden)
    tensors = safetensors.numpy.load_file(golden / "encoders" / case / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        if "weights_in" in name:
            gate, up = np.split(tensor, 2)
            renamed |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
        else:
            new = name.replace("attention.attention.query", "attention.q_proj").replace("weights_out", "down_proj")
            renamed[new.replace("attention.attention.key", "attention.k_proj")] = tensor
    family = families.FAMILIES["Dinov2withNorm"]
    norm = ("norm/scale", "norm/bias")
    tree = convert.convert(renamed, family.table, built.pretrained["encoder"], norm)
    assert_same(tree, built.pretrained["encoder"])


@pytest.mark.parametrize(
    "name", ["a/..", "../../etc", "a/b/../../../etc/passwd", "a b/c", "ä/ö", "a\0/b", "a/b\n", "--x/y",
             "a/" + "b" * 300, "a/b?x=1", "a%2e%2e/b", "a//b", "file:///etc/passwd", "\ud800/x", "gs://"],
)  # fmt: skip
def test_names_that_are_no_hub_ids_are_refused(name):
    for fetch in (sources.fetch_folder, sources.fetch_file, sources.read_state_dict):
        with pytest.raises((WeightsError, StorageError)):
            fetch(name, "the field")
