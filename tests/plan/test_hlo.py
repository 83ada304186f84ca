"""The reading of a schedule counts its collectives and its HBM traffic as often as they run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from plan import hlo
from plan.traffic import traffic

SCHEDULE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (in: f32[1024]) -> f32[256] {
  %in = f32[1024]{0:T(1024)} parameter(0)
  %all-reduce.9 = f32[1024]{0:T(1024)} all-reduce(%in), replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%add
  ROOT %slice.9 = f32[256]{0} slice(%all-reduce.9), slice={[0:256]}
}

%sliced (stack: f32[7,1024], at: s32[]) -> f32[1024] {
  %stack = f32[7,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part.1 = f32[1,1024]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%part.1)
}

%condition (state: (s32[], f32[1024], f32[7,1024])) -> pred[] {
  %state.1 = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (state: (s32[], f32[1024], f32[7,1024])) -> (s32[], f32[1024], f32[7,1024]) {
  %state.2 = (s32[], f32[1024]{0}, /*index=2*/f32[7,1024]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %stack.2 = f32[7,1024]{1,0} get-tuple-element(%state.2), index=2
  %slice.2 = f32[1024]{0} fusion(%stack.2, %i.2), kind=kLoop, calls=%sliced
  %near = f32[1024]{0:T(1024)S(1)} copy(%slice.2)
  %part = f32[256]{0:T(256)S(1)} fusion(%near), kind=kCustom, calls=%all-reduce-scatter.1
  %whole = bf16[2048]{0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=1, \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %next = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) tuple(%i.2, %slice.2, %stack.2)
}

ENTRY %main (x: f32[1024], stack: f32[7,1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %stack.3 = f32[7,1024]{1,0} parameter(1)
  %start = s32[] constant(0)
  %first = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) tuple(%start, %x, %stack.3)
  %loop = (s32[], f32[1024]{0}, f32[7,1024]{1,0}) while(%first), condition=%condition, body=%body
  %out = f32[1024]{0} get-tuple-element(%loop), index=1
  %swap.1 = (f32[1024]{0:S(1)}, f32[1024]{0:S(1)}) collective-permute-start(%out), \
source_target_pairs={{0,1},{1,0}}
  ROOT %swap.2 = f32[1024]{0} collective-permute-done(%swap.1)
}
"""


def test_collectives_count_as_often_as_they_run():
    found = traffic(SCHEDULE)
    # Three quarters of the 4096 bytes of an all-gather come from the three other devices.
    assert found.collectives == {
        "all-gather": (7, 7 * 4096 * 3 / 4),
        "reduce-scatter": (7, 7 * 4096 * 3 / 4),
        "collective-permute": (1, 4096),
    }
    assert found.unknown_loops == 0


def test_hbm_traffic_counts_slices_and_no_vector_memory():
    """An iteration reads and writes the 4096 bytes of its slice, and reads them again for the copy
    into vector memory; the last line's result leaves it.
    """
    copied = 4096
    scalars = 4 * 7  # the fusion's index
    assert traffic(SCHEDULE).hbm_bytes == 7 * (2 * 4096 + copied) + scalars


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    found = traffic(SCHEDULE.replace("direction=LT", "direction=NE"))
    assert found.unknown_loops == 1 and found.collectives["all-gather"][0] == 1
    known = SCHEDULE.replace("direction=LT", "direction=NE").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert traffic(known).collectives["all-gather"][0] == 5


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=2,'b'=8] {'b':(1)4}",
    ],
)
def test_group_size_is_read_in_every_notation(groups):
    assert hlo.group_size(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}") == 4


def test_a_compiled_program_agrees():
    """Gathers a [64, 64] float32, of which eight devices have an eighth each, five times."""
    mesh = Mesh(jax.devices(), ("x",))

    @jax.jit
    def gather_and_multiply(x, stack):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jax.lax.scan(body, x, stack)[0]

    rows = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    stack = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x"))
    )
    found = traffic(gather_and_multiply.lower(rows, stack).compile().as_text() or "")
    count, received = found.collectives["all-gather"]
    # The compiler may gather all five before the loop.
    assert received == 5 * 64 * 64 * 4 * 7 / 8 and count in (1, 5)
    assert found.unknown_loops == 0
