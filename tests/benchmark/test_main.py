import pytest

from vqrae_jax.benchmark import __main__ as benchmark


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_is_an_answer(asked, capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main([asked])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"  {name}: " in shown for name in benchmark.BENCHMARKS)
    assert max(map(len, shown.splitlines())) <= 80


def test_no_such_benchmark_is_a_mistake():
    with pytest.raises(SystemExit, match="usage: python -m vqrae_jax"):
        benchmark.main(["speed"])
