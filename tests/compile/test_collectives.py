"""Bytes read from HLO against programs whose traffic is known beforehand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aunet_jax.compile import collectives, step_time

P = PartitionSpec
DIMS = (64, 48)  # float32: 12,288 bytes
SIZE = 64 * 48 * 4


def make_mesh(*shape):
  return jax.make_mesh(
    shape, ("a", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape)
  )


def compiled(function, mesh, spec, dims=DIMS):
  x = jax.ShapeDtypeStruct(
    dims, jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  return jax.jit(function).lower(x).compile().as_text()


def on_shards(function, mesh, out=None, spec=None):
  """`function` of a device's rows, the last axis' name to talk over."""
  spec = P("a") if spec is None else spec
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=spec,
    out_specs=spec if out is None else out,
    check_vma=False,
  )


def kinds_of(hlo):
  found, unknown = collectives.find(hlo)
  assert not unknown
  return {
    kind: (entry["count"], entry["bytes"])
    for kind, entry in collectives.by_kind(found).items()
  }


# A device holds DIMS / 8; what each must count of it is worked out by hand.
KNOWN = {
  "all-gather": (
    lambda x: jax.lax.all_gather(x, "a", tiled=True),
    SIZE,  # what it gives
  ),
  "all-reduce": (lambda x: jax.lax.psum(x, "a"), SIZE // 8),
  "reduce-scatter": (
    lambda x: jax.lax.psum_scatter(x, "a", tiled=True),
    SIZE // 8,  # what it takes
  ),
  "all-to-all": (
    lambda x: jax.lax.all_to_all(x, "a", 1, 0, tiled=True),
    SIZE // 8,
  ),
  "collective-permute": (
    lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 8) for i in range(8)]),
    SIZE // 8,
  ),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_each_kind_counts_the_largest_array_a_device_holds(kind):
  function, expected = KNOWN[kind]
  hlo = compiled(on_shards(function, make_mesh(8)), make_mesh(8), P("a"))
  assert kinds_of(hlo) == {kind: (1, expected)}


def test_loops_multiply_and_nest():
  def inner(x, _):
    return jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), None

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x * 2, length=5)
    return jax.lax.psum(x, "a") / 7, None

  def loops(x):
    return jax.lax.scan(outer, x, length=3)[0]

  hlo = compiled(on_shards(loops, make_mesh(8)), make_mesh(8), P("a"))
  assert kinds_of(hlo) == {
    "collective-permute": (15, 15 * SIZE // 8),
    "all-reduce": (3, 3 * SIZE // 8),
  }


def test_a_loop_that_data_end_counts_once_and_is_named():
  def until(x):
    return jax.lax.while_loop(
      lambda x: x.sum() < 100.0, lambda x: jax.lax.psum(x, "a"), x
    )

  mesh = make_mesh(8)
  found, unknown = collectives.find(
    compiled(on_shards(until, mesh), mesh, P("a"))
  )
  assert [c.times for c in found] == [1] and len(unknown) == 1


def test_both_branches_count():
  def either(x):
    def sums(x):
      return jax.lax.psum(x, "a")

    def moves(x):
      return jax.lax.ppermute(x, "a", [(0, 1)])

    first = jax.lax.psum(x[0, 0], "a") > 0
    return jax.lax.cond(first, sums, moves, x)

  mesh = make_mesh(8)
  found = kinds_of(compiled(on_shards(either, mesh), mesh, P("a")))
  assert found["collective-permute"] == (1, SIZE // 8)
  assert found["all-reduce"] == (2, SIZE // 8 + 4)


def test_what_the_partitioner_adds_is_found_and_sized():
  mesh = make_mesh(4, 2)

  def gathers(x):  # rows over a, columns over b -> rows over a alone
    return jax.lax.with_sharding_constraint(
      jnp.sin(x), NamedSharding(mesh, P("a", None))
    )

  hlo = compiled(gathers, mesh, P("a", "b"))
  assert kinds_of(hlo) == {"all-gather": (1, SIZE // 4)}
  (collective,) = collectives.find(hlo)[0]
  assert collective.group_size == 2
  assert collective.shapes == (("f32", (16, 48)),)


def test_one_device_sends_nothing():
  hlo = compiled(lambda x: x @ x.T, make_mesh(1), P())
  assert collectives.find(hlo) == ([], [])


# Forms only TPU and GPU programs have, cut down from real ones.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=64

%start.1 (p: bf16[32,512]) -> (bf16[32,512], bf16[256,512]) {
  %p = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=8], device_ids=([8,8]T(1,0)) {'axis_2'}, dimensions={0}
}

%step.1 (p: bf16[32,512]) -> bf16[256,512] {
  %p = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=8], device_ids=([8,8]T(1,0)) {'axis_2'}, dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[256,512]) -> bf16[32,512] {
  %p = bf16[256,512]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %r = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
  ROOT %s = bf16[32,512]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={32,512}
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%body (t: (s32[], bf16[32,512])) -> (s32[], bf16[32,512]) {
  %t = (s32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[32,512]{1,0} get-tuple-element(%t), index=1
  %async = (bf16[32,512]{1,0}, bf16[256,512]{1,0}, s32[2]{0:S(4)}) fusion(%x), kind=kCustom, calls=%start.1
  %hidden = bf16[256,512]{1,0} fusion(%x), kind=kCustom, calls=%step.1
  %y = bf16[32,512]{1,0} fusion(%hidden), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[32,512]{1,0}) tuple(%i, %y)
}

%cond (t: (s32[], bf16[32,512])) -> pred[] {
  %n = s32[]{:T(128)} constant(25)
  %t = (s32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[32,512]) -> bf16[32,512] {
  %x = bf16[32,512]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, bf16[32,512]{1,0}) tuple(%zero, %x)
  %w = (s32[]{:T(128)}, bf16[32,512]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %y = bf16[32,512]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501
GPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: f32[8,4], y: f32[2,4]) -> f32[64,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[2,4]{1,0} parameter(1)
  %s = ((f32[8,4]{1,0}, f32[2,4]{1,0}), (f32[64,4]{1,0}, f32[16,4]{1,0})) all-gather-start(%x, %y), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %d = (f32[64,4]{1,0}, f32[16,4]{1,0}) all-gather-done(%s)
  %c = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %e = f32[8,4]{1,0} collective-permute-done(%c)
  %r = f32[1,4]{1,0} reduce-scatter(%x), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %p = (f32[8,4]{1,0}, f32[1,4]{1,0}) reduce-scatter-start(%x), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  %q = f32[1,4]{1,0} reduce-scatter-done(%p)
  %a = token[] after-all()
  %m = (f32[8,4]{1,0}, u32[], token[]) send(%x, %a), channel_id=6, is_host_transfer=true
  %n = token[] send-done(%m), channel_id=6, is_host_transfer=true
  %alone = f32[8,4]{1,0} all-reduce(%x), channel_id=4, replica_groups=[8,1]<=[8]
  ROOT %o = f32[64,4]{1,0} get-tuple-element(%d), index=0
}
"""  # noqa: E501


def test_steps_of_one_asynchronous_gather_count_once_per_turn():
  assert kinds_of(TPU) == {
    "all-gather": (25, 25 * 256 * 512 * 2),
    "reduce-scatter": (25, 25 * 256 * 512 * 2),
  }
  assert {c.group_size for c in collectives.find(TPU)[0]} == {8}


def test_layers_that_are_no_loop_share_channels_and_count_each():
  """Fused steps are told apart by their chain, others by themselves."""

  def gather(chain):
    return (
      "%g = bf16[64]{0} all-gather(%p), channel_id=3, dimensions={0}, "
      "replica_groups={{0,1,2,3}}" + chain
    )

  fused = [
    f"%{name}.{layer} (p: bf16[16]) -> bf16[64] {{\n"
    f"  %p = bf16[16]{{0}} parameter(0)\n  ROOT "
    + gather(f', frontend_attributes={{chain_id="{layer}"}}')
    + "\n}\n"
    for layer in (1, 2, 3)
    for name in ("start", "step")
  ]
  calls = [
    f"  %{name}.{layer}.call = bf16[64]{{0}} fusion(%p), kind=kCustom, "
    f"calls=%{name}.{layer}"
    for layer in (1, 2, 3)
    for name in ("start", "step")
  ]
  plain = [f"  {gather('')}".replace("%g", f"%plain.{n}") for n in (1, 2)]
  for layer in (1, 2):
    fused.append(
      f"%all-reduce-scatter.{layer} (p: bf16[16]) -> bf16[4] {{\n"
      "  %p = bf16[16]{0} parameter(0)\n  %z = s32[] constant(0)\n"
      "  %r = bf16[16]{0} all-reduce(%p), channel_id=4, "
      "replica_groups={{0,1,2,3}}, to_apply=%add\n"
      "  ROOT %s = bf16[4]{0} dynamic-slice(%r, %z)\n}\n"
    )
    calls.append(
      f"  %sum.{layer} = bf16[4]{{0}} fusion(%p), kind=kCustom, "
      f"calls=%all-reduce-scatter.{layer}"
    )
  text = "\n".join(
    ["HloModule jit_f, num_partitions=4\n", *fused]
    + ["ENTRY %main (p: bf16[16]) -> bf16[64] {"]
    + ["  %p = bf16[16]{0} parameter(0)", *calls, *plain]
    + ["  ROOT %out = bf16[64]{0} add(%plain.1, %plain.2)", "}"]
  )
  assert kinds_of(text) == {
    "all-gather": (5, 5 * 64 * 2),
    "reduce-scatter": (2, 2 * 16 * 2),
  }
  sent = [x.opcode for x in step_time.read(text)[0]]
  assert (sent.count("all-gather"), sent.count("reduce-scatter")) == (5, 2)


def test_started_collectives_count_their_results_and_groups_of_one_nothing():
  assert kinds_of(GPU) == {
    "all-gather": (1, 64 * 4 * 4 + 16 * 4 * 4),
    "collective-permute": (1, 8 * 4 * 4),
    "reduce-scatter": (2, 2 * 8 * 4 * 4),
    "send": (1, 8 * 4 * 4),
  }
