"""The predictors of benchmarks/code_baselines.py are distributions, and know what they should."""

import json

import numpy as np
import pytest

from benchmarks import code_baselines
from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import Columns
from vqrae_jax.errors import DataError

K = 5


def test_probabilities_of_all_codes_have_the_sum_1():
    train = np.random.default_rng(0).integers(0, K, (4, 3, 3))
    contexts = code_baselines.neighbors(train, "left")
    unigram = np.full(K, 1 / K)
    for context in (-1, *np.unique(contexts), 2 * K + 1):  # the last is not in the training codes
        asked = np.full(K, context)
        p = code_baselines.conditional((contexts, asked), train, np.arange(K), unigram, 2.0)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)


def test_neighbors_predict_what_they_decide():
    """Rows of equal codes, which differ: the left neighbor decides a code, the one above says nothing."""
    train, val = (np.random.default_rng(i).integers(0, K, (400, 4, 1)).repeat(4, axis=2) for i in (0, 1))
    bits = code_baselines.measure(train, val, K)
    assert bits["uniform"] == np.log2(K)
    for name in ("unigram", "position"):
        assert bits[name] == pytest.approx(np.log2(K), abs=0.01)
    assert bits["left"] == pytest.approx(np.log2(K) / 4, abs=0.03)  # the first column has the unigram
    assert bits["above"] == pytest.approx(np.log2(K) * 13 / 16, abs=0.03)  # the first row has left neighbors


def test_levels_of_free_tokens_are_not_a_grid(tmp_path):
    plan = codes.Plan("0" * 64, "test", 0, "one", (9, 2), "uint16", K, 24, "npz", 6, grids=((1, 9),))
    codes.start_dataset(tmp_path, plan)
    codes.finish_dataset(tmp_path, plan)
    with pytest.raises(DataError) as error:
        code_baselines.read_grids(str(tmp_path))
    assert error.value.field == "--train"


def test_reads_views_and_levels(tmp_path, capsys):
    for name, views in (("train", "flip"), ("val", "one")):
        shape = ((2,) if views == "flip" else ()) + (3, 3, 2)
        plan = codes.Plan("0" * 64, "test", 6, views, shape, "uint16", K, 24, "npz", 6)
        codes.start_dataset(tmp_path / name, plan)
        drawn = np.random.default_rng(0).integers(0, K, (6, *shape)).astype(np.uint16)
        labels, ids = np.zeros(6, np.int32), [str(i) for i in range(6)]
        codes.write_shard(tmp_path / name, plan, 0, Columns(np.arange(6), ids, labels, drawn))
        codes.finish_dataset(tmp_path / name, plan)
    code_baselines.main([f"--train={tmp_path / 'train'}", f"--val={tmp_path / 'val'}"])
    assert set(json.loads(capsys.readouterr().out)) == {
        "uniform",
        "unigram",
        "position",
        "left",
        "above",
        "left, above",
    }
