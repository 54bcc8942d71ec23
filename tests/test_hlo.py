"""Figures read from the text of a compiled program: a written one, and a live one."""

import jax
import jax.numpy as jnp

from ctc_spec_jax import hlo
from ctc_spec_jax.hlo import Traffic

TEXT = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused.1 (p: bf16[8,4]) -> bf16[8,16] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7
}

%fused.2 (p: bf16[8,4]) -> bf16[8,16] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%p.2), channel_id=7, dimensions={1}
}

%inner.body (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  ROOT %n = s32[] add(%s, %s), backend_config={"window_config":{"estimated_cycles":"5"}}
}

%inner.cond (s: s32[]) -> pred[] {
  %s.1 = s32[] parameter(0)
  ROOT %less = pred[] constant(false)
}

%body (t: (s32[], bf16[2,4,8,8])) -> (s32[], bf16[2,4,8,8]) {
  %t = (s32[], bf16[2,4,8,8]{3,2,1,0}) parameter(0)
  %cache = bf16[2,4,8,8]{3,2,1,0} get-tuple-element(%t), index=1
  %copy.1 = bf16[2,4,8,8]{2,3,1,0:T(8,128)} copy(%cache), b={"estimated_cycles":"40"}
  %fetch = (bf16[2,4,8,8]{3,2,1,0:T(8,128)S(1)}, bf16[2,4,8,8]{3,2,1,0}) copy-start(%cache)
  %w1 = bf16[8,16]{1,0} fusion(%cache), calls=%fused.1, b={"estimated_cycles":"100"}
  %w2 = bf16[8,16]{1,0} fusion(%cache), calls=%fused.2, b={"estimated_cycles":"200"}
  %all-reduce.5 = (f32[8]{0}, f32[8,2]{1,0}) all-reduce(%a, %b), channel_id=3, to_apply=%add
  %cp = (bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=4
  %cp.done = bf16[8]{0} collective-permute-done(%cp)
  %loop = s32[] while(%i), condition=%inner.cond, body=%inner.body
  ROOT %out = (s32[], bf16[2,4,8,8]{3,2,1,0}) tuple(%loop, %copy.1)
}

%cond (t: (s32[], bf16[2,4,8,8])) -> pred[] {
  %t.1 = (s32[], bf16[2,4,8,8]{3,2,1,0}) parameter(0)
  %odd = s32[] constant(0), b={"estimated_cycles":"9223372036854775807"}
  ROOT %all-reduce.9 = pred[] all-reduce(%b.1), channel_id=9, to_apply=%add
}

ENTRY %main (a: bf16[2,4,8,8]) -> bf16[2,4,8,8] {
  %a = bf16[2,4,8,8]{3,2,1,0} parameter(0)
  %copy.2 = bf16[2,4,8,8]{2,3,1,0} copy(%a), backend_config={"estimated_cycles":"1000"}
  %all-gather-start = (f32[4]{0}, f32[16]{0}) all-gather-start(%z), channel_id=11
  %while = (s32[], bf16[2,4,8,8]{3,2,1,0}) while(%tuple), condition=%cond, body=%body
  ROOT %gte = bf16[2,4,8,8]{3,2,1,0} get-tuple-element(%while), index=1
}
"""
CACHE = ("bf16", (2, 4, 8, 8))


def test_a_written_program():
    """Counted by hand.

    A gather in two computations is one; a fetch into fast memory is no copy; the inner loop
    belongs to the turn of the outer one; an asynchronous pair counts once, by its result.
    """
    turn, rest = hlo.summary(TEXT, {CACHE})
    assert turn.collectives == {
        "all-gather": Traffic(1, 256),
        "all-reduce": Traffic(2, 32 + 64 + 1),
        "collective-permute": Traffic(1, 16),
    }
    assert (turn.copies, turn.cycles) == (1, 5 + 40 + 100 + 200)
    assert rest.collectives == {"all-gather": Traffic(1, 64)}
    assert (rest.copies, rest.cycles) == (1, 1000)
    assert hlo.summary(TEXT, {("f32", CACHE[1])})[0].copies == 0


TRANSPOSES = """
%moved (p: bf16[2,4,8,8]) -> (bf16[8,8,8], f32[4]) {
  %p = bf16[2,4,8,8]{3,2,1,0} parameter(0)
  %merged = bf16[8,8,8]{2,1,0} bitcast(%p)
  %turned = bf16[8,8,8]{2,1,0} transpose(%merged), dimensions={0,2,1}
  %same = bf16[8,8,8]{2,1,0} bitcast(%turned)
  %other = f32[4]{0} constant({1, 2, 3, 4})
  ROOT %both = (bf16[8,8,8]{2,1,0}, f32[4]{0}) tuple(%same, %other)
}

%padded (p.1: bf16[2,4,6,8]) -> bf16[2,4,8,8] {
  %p.1 = bf16[2,4,6,8]{3,2,1,0} parameter(0)
  %zero = bf16[] constant(0)
  %rows = bf16[2,4,8,8]{3,2,1,0} pad(%p.1, %zero), padding=0_0x0_0x0_2x0_0
  ROOT %written = bf16[2,4,8,8]{3,2,1,0} transpose(%rows), dimensions={0,1,3,2}
}

%product (p.2: bf16[2,4,8,8]) -> f32[8] {
  %p.2 = bf16[2,4,8,8]{3,2,1,0} parameter(0)
  %read = bf16[2,4,8,8]{3,2,1,0} transpose(%p.2), dimensions={0,1,3,2}
  ROOT %sum = f32[8]{0} custom-call(%read)
}

ENTRY %main (a: bf16[2,4,8,8], b: bf16[2,4,6,8]) -> f32[8] {
  %a = bf16[2,4,8,8]{3,2,1,0} parameter(0)
  %b = bf16[2,4,6,8]{3,2,1,0} parameter(1)
  %fusion.1 = (bf16[8,8,8]{2,1,0}, f32[4]{0}) fusion(%a), kind=kInput, calls=%moved
  %fusion.2 = bf16[2,4,8,8]{3,2,1,0} fusion(%b), kind=kInput, calls=%padded
  %alone = bf16[4,8,2,8]{3,2,1,0} transpose(%fusion.2), dimensions={1,2,0,3}
  %small = bf16[8,2]{1,0} transpose(%c), dimensions={1,0}
  ROOT %fusion.3 = f32[8]{0} fusion(%a), kind=kCustom, calls=%product
}
"""


def test_transposes_of_caches():
    """One in a fusion that does nothing else, one by itself.

    None that writes padded rows, that a product reads, or of another size.
    """
    assert hlo.summary(TRANSPOSES, {CACHE})[1].copies == 2
    assert hlo.summary(TRANSPOSES, {("bf16", (8, 2))})[1].copies == 1
    assert hlo.summary(TRANSPOSES, {("f32", CACHE[1])})[1].copies == 0


def test_bytes():
    assert hlo.shape_bytes(("bf16", (3, 5))) == 30
    assert hlo.shape_bytes(("f8e4m3fn", (4,))) == 4 == hlo.shape_bytes(("pred", (4,)))
    assert hlo.shape_bytes(("s4", (6,))) == 3 and hlo.shape_bytes(("u32", ())) == 4
    assert hlo.shape_bytes(("token", ())) == 0


def test_a_live_program():
    """A loop that reads a cache after the write copies it in every turn; another one does not.

    Without a loop, everything is the rest.
    """

    def run(late):
        def body(carry):
            i, x, total = carry
            new = x.at[i].set(1.0)
            return (
                i + 1,
                new,
                total + jnp.sum(jnp.sort(x, axis=0)[0] if late else new[0]) * new[1, 1],
            )

        start = (jnp.int32(0), jnp.float32(0))
        return lambda x: jax.lax.while_loop(lambda c: c[0] < 5, body, (start[0], x, start[1]))

    x = jnp.zeros((64, 32))
    copies = []
    for late in (False, True):
        compiled = jax.jit(run(late), donate_argnums=0).lower(x).compile()
        copies.append(hlo.summary(compiled.as_text(), {("f32", (64, 32))})[0].copies)
    assert copies[0] == 0 < copies[1]
    text = jax.jit(lambda x: x @ x.T).lower(x).compile().as_text()
    turn, _ = hlo.summary(text)
    assert turn == hlo.Part({}, 0, 0) and len(hlo.parse(text)) > 1
