"""The hot loops are what they are meant to be: products from registers and memory, sums that stay in registers."""

from __future__ import annotations

import shutil

import pytest
from inner_loops import INTEGER, LEAST, Loop, functions, innermost, loops, short

from qcompile.kernels.cpu import build

LISTING = """
0000000000001000 <void ns::dot<ns::A, 4>(int const*, long)>:
    1000:	mov    %rsp,%rbp
    1004:	xor    %eax,%eax
    1008:	vmovdqu (%rdi),%ymm0
    100c:	vpmaddubsw (%rsi),%ymm0,%ymm1
    1010:	vmovdqa %ymm1,0x20(%rsp)
    1014:	vpaddw -0x40(%rbp),%ymm1,%ymm2
    1018:	mov    0x8(%rsp),%rdx
    101c:	vmovdqu %ymm2,(%rcx)
    1020:	add    $0x1,%rax
    1024:	jne    1008 <void ns::dot<ns::A, 4>(int const*, long)+0x8>
    1028:	cmp    $0x2,%rbx
    102c:	jb     1004 <void ns::dot<ns::A, 4>(int const*, long)+0x4>
    1030:	ret
"""


def test_loop_is_read() -> None:
    [(name, body)] = functions(LISTING)
    assert len(body) == 13
    [loop] = innermost(name, body)  # the outer one, to 1004, holds another
    assert [hex(i.address) for i in (loop.body[0], loop.body[-1])] == ["0x1008", "0x1024"]
    assert loop.multiplies(INTEGER) == 1 and loop.multiplies(("vfmadd",)) == 0
    assert loop.loads == 2  # of (%rdi) and of (%rsi); the store to (%rcx) is none, nor is what lies on the stack
    assert loop.spills == 2  # by rsp, and by rbp, which is the frame here; rdx is no vector register


def test_register_that_is_no_frame() -> None:
    [(name, body)] = functions(LISTING.replace("mov    %rsp,%rbp", "mov    %rsi,%rbp"))
    [loop] = innermost(name, body)
    assert loop.spills == 1 and loop.loads == 3


def test_short_names() -> None:
    long = "void qcompile::(anonymous namespace)::dot<qcompile::(anonymous namespace)::A, 4>(int, long)"
    assert short(long) == "dot<A, 4>"
    assert short("qcompile::(anonymous namespace)::Run<int>::run()::{lambda(int)#1}::_FUN(int)").startswith(
        "Run<int>::run()"
    )


@pytest.fixture(scope="module")
def hot() -> list[Loop]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if not build.ensure_loaded().loaded:
        pytest.skip(build.status())
    return [loop for loop in loops(build.library_path()) if loop.multiplies(INTEGER) >= LEAST]


def _of(hot: list[Loop], isa: str) -> list[Loop]:
    found = [loop for loop in hot if isa in loop.function]
    if not found:
        pytest.skip(f"the library has no code for {isa}")
    return found


def test_vnni_loops_spill_nothing(hot: list[Loop]) -> None:
    for loop in _of(hot, "Avx512"):
        assert loop.spills == 0, loop.function
        assert loop.loads <= 2.5 * loop.multiplies(INTEGER), loop.function


def test_avx2_loops_spill_little(hot: list[Loop]) -> None:
    """16 registers: the largest tiles keep a few sums or constants of a block in memory, the others none."""
    for loop in _of(hot, "Avx2"):
        count = loop.multiplies(INTEGER)
        assert loop.spills <= 0.25 * count, loop.function
        assert loop.loads <= 2.5 * count, loop.function
