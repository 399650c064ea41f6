"""FLOPs and bytes of compiled programs, loops counted: against formulas, and against text written by hand."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lm.aot import chips
from lm.aot.compiled import compile_for, kind, largest
from lm.aot.cost import cost
from lm.aot.program import arrays, read

B, D, F, L = 16, 32, 64, 5


def gradient(remat: bool) -> Any:
    """Gradient of L layers of two products in a loop, with respect to weights and input."""

    def layer(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ p[0]) @ p[1], None

    step = jax.checkpoint(layer) if remat else layer
    return jax.jit(jax.grad(lambda p, x: jax.lax.scan(step, x, p)[0].sum(), argnums=(0, 1)))


@pytest.mark.parametrize(("remat", "products"), [(False, 6), (True, 7)])
def test_flops_of_a_loop(remat: bool, products: int) -> None:
    """Two products forward, four backward, and with remat the first again: what the second would give is not needed."""
    p, x = (jnp.ones((L, D, F)), jnp.ones((L, F, D))), jnp.ones((B, D))
    found = cost(read(gradient(remat).lower(p, x).compile().as_text()))
    assert found.flops == L * products * 2 * B * D * F
    assert found.bytes >= 2 * L * 2 * D * F * 4 and found.endless == 0 and not found.silent


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_a_loop_by_the_tpu_compiler() -> None:
    """The same FLOPs as convolutions; weights are read and their gradients written once, activations stay near."""
    where = SingleDeviceSharding(chips.devices("v5e:2x2")[0])

    def like(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    rows, width, inner = 128, 256, 512
    done = compile_for(gradient(True).lower((like(L, width, inner), like(L, inner, width)), like(rows, width)))
    found = cost(read(done.text))
    assert done.refusal is None and found.flops == L * 7 * 2 * rows * width * inner
    weights, ends = 2 * L * width * inner * 4, 2 * rows * width * 4
    assert 2 * weights <= found.bytes <= 2 * weights + 2 * ends


TEXT = """
%fused (p.0: f32[8,128], p.1: s32[], p.2: f32[1,128]) -> (f32[8,128], f32[1,128]) {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %p.2 = f32[1,128]{1,0:T(1,128)S(1)} parameter(2)
  %s = f32[1,128]{1,0:T(1,128)} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,128}
  %a = f32[1,128]{1,0:T(1,128)} add(%s, %p.2)
  %u = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%p.0, %a, %p.1, %p.1)
  ROOT %t = (f32[8,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(1,128)S(1)}) tuple(%u, %a)
}
%product (q.0: f32[4,128], q.1: f32[128]) -> f32[4] {
  %q.0 = f32[4,128]{1,0:T(4,128)} parameter(0)
  %q.1 = f32[128]{0:T(128)S(1)} parameter(1)
  %b = f32[4,128]{1,0:T(4,128)} broadcast(%q.1), dimensions={1}
  %m = f32[4,128]{1,0:T(4,128)} multiply(%q.0, %b)
  ROOT %r = f32[4]{0:T(128)} reduce(%m, %zero), dimensions={1}, to_apply=%add
}
%cond (c: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)S(6)} constant(3)
  ROOT %lt = pred[]{:T(512)S(6)} compare(%c, %limit), direction=LT
}
%body (w: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %n = s32[]{:T(128)S(6)} get-tuple-element(%w), index=0
  %near = f32[1,128]{1,0:T(1,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = (f32[8,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(1,128)S(1)}) fusion(%g, %n, %near), kind=kLoop, calls=%fused
}
%small (x.1: f32[4,128]) -> f32[4,128] {
  ROOT %x.1 = f32[4,128]{1,0:T(4,128)} parameter(0)
}
%dear (x.2: f32[4,128]) -> f32[4,128] {
  %x.2 = f32[4,128]{1,0:T(4,128)} parameter(0)
  ROOT %neg = f32[4,128]{1,0:T(4,128)} negate(%x.2)
}
ENTRY %main (in.0: f32[4,128], in.1: f32[128], in.2: f32[1,8,16]) -> f32[4] {
  %in.0 = f32[4,128]{1,0:T(4,128)} parameter(0)
  %in.1 = f32[128]{0:T(128)S(1)} parameter(1)
  %in.2 = f32[2,8,16]{2,1,0} parameter(2)
  %in.3 = f32[3,16,32]{2,1,0} parameter(3)
  %start = (s32[], f32[8,128]) tuple(%in.0, %in.1)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  %conv = f32[2,8,32]{2,1,0} convolution(%in.2, %in.3), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
  %choice = f32[4,128]{1,0:T(4,128)} conditional(%c, %in.0, %in.0), branch_computations={%small, %dear}
  %k = f32[128]{0:T(128)S(1)} custom-call(%in.0), custom_call_target="tpu_custom_call", KERNEL
  %unknown = f32[128]{0:T(128)S(1)} custom-call(%in.0), custom_call_target="Mystery"
  ROOT %mv = f32[4]{0:T(128)} fusion(%in.0, %in.1), kind=kLoop, calls=%product
}
"""


KERNEL = 'backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"7000","bytes_accessed":"900"}}}'
TEXT = TEXT.replace("KERNEL", KERNEL)
INDEX = "  %i = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0\n  %limit ="
TWO = """calls=%fused
  %two = s32[]{:T(128)S(6)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%n, %two)
  ROOT %out = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %g)
"""


def test_text_by_hand() -> None:
    """A row read and written in place three times; a padded convolution; the dearer branch; kernels; a matrix times a
    vector. What lies in the chip's own memory costs nothing."""
    found = cost(read(TEXT))
    row, matrix = 128 * 4, 4 * 128 * 4
    convolution = 2 * 2 * 16 * 32 * (7 + 8 + 7)  # the first and last place of the window each miss one of 8
    assert found.flops == convolution + 7000 + 2 * 4 * 128 and found.kernels == 7000
    operands = (2 * 8 * 16 + 3 * 16 * 32 + 2 * 8 * 32) * 4
    product = matrix + 128 * 4  # four results fill one tile of 128
    assert found.bytes == 3 * 2 * row + operands + 2 * matrix + 900 + matrix + product
    assert found.silent == {"Mystery"} and found.endless == 0
    counted = TEXT.replace("compare(%c, %limit)", "compare(%i, %limit)").replace("  %limit =", INDEX)
    by_twos = cost(read(counted.replace("ROOT %f =", "%f =").replace("calls=%fused\n", TWO)))
    assert cost(read(counted)).bytes == found.bytes and found.bytes - by_twos.bytes == 2 * row
    endless = cost(read(TEXT.replace("constant(3)", "parameter(1)")))
    assert endless.endless == 1 and found.bytes - endless.bytes == 2 * 2 * row


def test_arrays_fill_tiles() -> None:
    a, b, c, flag = arrays(
        "(bf16[6,64]{1,0:T(8,128)(2,1)}, f32[3,5]{0,1:T(4,128)S(1)}, /*index=2*/s4[8]{0}, u32[]{:S(2)})"
    )
    assert (a.size, a.bytes, a.near, a.far) == (8 * 128 * 2, 6 * 64 * 2, False, 8 * 128 * 2)
    assert (b.size, b.near, b.far) == (8 * 128 * 4, True, 0) and c.size == 4 and flag.near


def test_dilated_convolutions_are_products() -> None:
    """The product of many small matrices as TPU programs write it: a window as large as the input, which is dilated."""
    text = """
ENTRY %main (a: f32[2,4,128,64], b: f32[2,4,128,64]) -> f32[2,4,128,128] {
  %a = f32[2,4,128,64]{3,2,1,0} parameter(0)
  %b = f32[2,4,128,64]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,4,128,128]{3,2,1,0} convolution(%a, %b), WINDOW, dim_labels=01bf_01oi->01bf
}
"""
    text = text.replace("WINDOW", "window={size=2x4 stride=1x3 lhs_dilate=2x4}")
    assert cost(read(text)).flops == 2 * 2 * 4 * 128 * 128 * 64


ASSIGNMENT = """BufferAssignment:
allocation 0: size 99999999, page 0, parameter 29, shape |f32[4]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=99999999,offset=0): f32[4]{0}
allocation 1: size 500, color 1, page 0, preallocated-temp:
 value: <2 near @1> (size=500,offset=0): f32[9]{0:T(8,128)S(1)}
allocation 2: size 4096, page 0, preallocated-temp:
 value: <3 fusion.1{0} @0> (size=1024,offset=0): bf16[512]{0}
 value: <4 again @0> (size=1024,offset=0): bf16[512]{0}
 value: <5 copy.2 @0> (size=2048,offset=1024): f32[2,256]{1,0}
"""


def test_temporaries_by_kind() -> None:
    text = (
        '  %fusion.1 = (bf16[512]) fusion(%x), metadata={op_name="jit(f)/transpose(jvp(Decoder))/Decoder._blocks/while/'
    )
    text += 'body/closed_call/checkpoint/Block_7/attn/q/dot_general" stack_frame_id=3}\n'
    assert largest(ASSIGNMENT, text) == [
        {"bytes": 2048, "shape": "f32[2,256]", "kind": "copy.2"},
        {"bytes": 1024, "shape": "bf16[512]", "kind": "backward: Block/attn/q/dot_general"},
    ]
    again = "jit(f)/transpose(jvp(Decoder))/while/body/checkpoint/rematted_computation/Block_2/ffn/up/dot_general"
    assert kind(again) == "recomputed: Block/ffn/up/dot_general"
    assert kind("jit(f)/jvp()/while/body/dot_general") == "forward: dot_general"
