"""Communication and memory traffic of programs for which both are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax import sharding
from vqrae_jax.preflight import hlo

LINE = "  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add"
GROUPS = {
    "{{0,1},{2,3}}": ((0, 1), (2, 3)),
    "[2,2]<=[4]": ((0, 1), (2, 3)),
    "[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['axis_0'=8] {'axis_0'}": (tuple(range(8)),),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}": ((3, 1), (0, 2)),
    "mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['a'=8] {'a':(1)2}": ((0, 4), (1, 5), (2, 6), (3, 7)),
}


@pytest.mark.parametrize(("text", "groups"), GROUPS.items())
def test_groups_are_read_in_every_format(text, groups):
    line = LINE.replace("{}", text).replace("{{0}}", "{0}")
    program = hlo.Program(f"ENTRY %main (y: f32[8]) -> f32[8] {{\n  %y = f32[8]{{0}} parameter(0)\n{line}\n}}\n", 8)
    (collective,) = program.collectives()
    assert collective == hlo.Collective("all-reduce", groups, 32.0, 1.0)


NESTED = """
%called (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  ROOT %gather = f32[8]{0} all-gather(%z), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
%async (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %call = f32[8]{0} custom-call(%y), custom_call_target="x", called_computations={%called}, a={b="1"}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %after = token[] after-all()
  %start = ((f32[8]{0}), f32[8]{0}, s32[8]{0:S(8)}) async-start(%x), calls=%async
  %done = f32[8]{0} async-done(%start)
  %send = (f32[8]{0}, u32[], token[]) send(%done, %after), channel_id=2, frontend_attributes={
}
"""
SLICES = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'


def test_collectives_of_sparse_cores_and_between_slices():
    between, within = hlo.Program(NESTED.replace("={\n}", "={" + SLICES + "\n}"), 8).collectives()
    assert within == hlo.Collective("all-gather", ((0, 1, 2, 3),), 4 * 32.0, 1.0)
    assert between == hlo.Collective("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 32.0, 1.0)


def compiled(function, mesh, *arguments):
    """Compiles a function for arguments given as (shape, spec)."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    return hlo.Program(jax.jit(function).lower(*shapes).compile().as_text(), mesh.size)


@pytest.mark.parametrize("axis", ["data", "model"])
def test_sum_over_one_axis_of_the_mesh_is_an_all_reduce_which_one_device_does_not_need(axis, one_mesh):
    mesh = sharding.make_mesh(4, 2)
    program = compiled(lambda x: x.sum(0), mesh, ((mesh.shape[axis], 64), P(axis)))
    (reduced,) = [c for c in program.collectives() if c.kind == "all-reduce"]
    assert hlo.mesh_axes(reduced, dict(mesh.shape)) == (axis,)
    assert reduced.size == 64 * 4
    assert compiled(lambda x: x.sum(0), one_mesh, ((8, 64), P(axis))).collectives() == []


def test_collectives_in_a_loop_count_its_trips():
    mesh = sharding.make_mesh(8, 1)

    def body(x, weights):
        return jnp.tanh(x @ weights), None

    program = compiled(lambda x, w: jax.lax.scan(body, x, w)[0], mesh, ((8, 16), P()), ((5, 16, 16), P(None, "data")))
    assert sum(c.trips * c.size for c in program.collectives()) >= 5 * 8 * 16 * 4 / 2
    assert {c.trips for c in program.collectives()} == {5}


def scanned(mesh, length):
    """Returns the traffic of a loop that reads a slice of its weights and writes a slice of its results per step."""

    def body(x, weights):
        return jnp.tanh(x @ weights), x

    program = compiled(lambda x, w: jax.lax.scan(body, x, w), mesh, ((64, 64), P()), ((length, 64, 64), P()))
    return program.memory_traffic()


def test_traffic_of_a_loop_is_linear_in_its_length_and_that_of_a_product_is_its_arrays(one_mesh):
    """The slices count, not the whole arrays."""
    traffic = scanned(one_mesh, 64)
    assert traffic == pytest.approx(4 * scanned(one_mesh, 16), rel=0.1)
    assert 3 <= traffic / (64 * 64 * 64 * 4) <= 16  # a weight read, a result read and written
    program = compiled(jnp.dot, one_mesh, ((128, 256), P()), ((256, 64), P()))
    assert program.memory_traffic() == 4 * (128 * 256 + 256 * 64 + 128 * 64)
