"""The hot loops are what they are meant to be: products from registers and memory, sums that stay in registers."""

from __future__ import annotations

import re
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


def _few_rows(hot: list[Loop]) -> dict[tuple[str, int, int], Loop]:
    """The loops around one block of weights: (instruction set, bits, rows of x) to the loop with the most spills."""
    found: dict[tuple[str, int, int], Loop] = {}
    for loop in hot:
        if match := re.match(r"dot_quantized<(\w+), (\d), \d, (\d), \w+>", short(loop.function)):
            key = match[1], int(match[2]), int(match[3])
            found[key] = max(found.get(key, loop), loop, key=lambda each: each.spills)
    return found


def test_few_rows_spill_nothing(hot: list[Loop]) -> None:
    """Where memory is the limit, one or two rows of x, all sums and codes are in registers: of every usual width."""
    found = _few_rows(hot)
    sets = {isa for isa, _, _ in found}
    assert "Avx2" in sets
    usual = {key: loop for key, loop in found.items() if key[1] in (4, 8) and key[2] <= 2 and key[0] != "Portable"}
    assert {(bits, rows) for isa, bits, rows in usual if isa == "Avx2"} >= {(4, 1), (8, 1), (8, 2)}
    assert {key: loop.spills for key, loop in usual.items() if loop.spills} == {}


def test_vnni_has_registers_for_all(hot: list[Loop]) -> None:
    """32 registers hold eight rows' sums."""
    found = {key: loop.spills for key, loop in _few_rows(hot).items() if key[0] == "Avx512Vnni"}
    if not found:
        pytest.skip("the library has no code for AVX-512 VNNI")
    assert len(found) >= 4 and {key: spills for key, spills in found.items() if spills} == {}


def test_many_rows_share_what_is_loaded(hot: list[Loop]) -> None:
    """Six rows meet two tiles in registers: less than one load a multiply, nothing spilled."""
    found = [each for each in hot if "dot_ready" in each.function and each.multiplies(INTEGER) == 8 * 6 * 2]
    if not any("Avx512Vnni" in each.function for each in hot):
        pytest.skip("the library has no code for AVX-512 VNNI")
    assert len(found) >= 3
    assert all(loop.spills == 0 and loop.loads < loop.multiplies(INTEGER) for loop in found)


def test_loops_multiply(hot: list[Loop]) -> None:
    """Of no loop half is spilling; each multiply comes with one load of activations and its share of weights. Four rows of
    AVX2 need 24 registers, of which there are 16: what is moved is what a block ends with, not what its products need."""
    for loop in hot:
        count, name = loop.multiplies(INTEGER), short(loop.function)
        if "Portable" not in name:
            usual = re.match(r"dot_quantized<\w+, [48], [48], ", name)
            assert loop.spills <= (0.3 if usual else 0.75) * count and loop.loads <= 3.5 * count, name
