"""From bit fields of 16-bit elements to floats, in registers, without a conversion instruction (see ``layouts/planes.py``).

A field that stands at bit p of the mantissa of a float whose exponent gives that bit the weight 1 *is* the code, plus that
power of two: an and, an or, and one exact subtraction, which takes the zero point off as well. Kernels for tensor cores read
*words* (int32, two elements), so that one such instruction makes two 16-bit floats.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(150 << 23)


@triton.jit
def field_shift(RUN: tl.constexpr, BITS: tl.constexpr):
    """Where the field of a run starts (of its low two bits, with 3 bits)."""
    return 2 * (RUN // 2) if BITS == 3 else BITS * RUN


@triton.jit
def split_words(words):
    """int32 ``[..., 16]`` -> int16 ``[..., 32]``: each word's low half, then its high half. Free, both being registers."""
    both = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    if len(words.shape) == 3:
        return both.reshape(words.shape[0], words.shape[1], 2 * words.shape[2])
    else:
        return both.reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def fields(low, high, RUN: tl.constexpr, BITS: tl.constexpr, ONES: tl.constexpr, MANTISSA: tl.constexpr):
    """The field of a run of each element, shifted down only as far as the mantissa needs: see :func:`field_start`.

    ONES: 1 for elements, 0x10001 for words. high: the elements with the high bits of 3-bit codes.
    """
    SHIFT: tl.constexpr = field_shift(RUN, BITS)
    START: tl.constexpr = field_start(RUN, BITS, MANTISSA)
    if BITS == 3:
        return ((low >> SHIFT) & (3 * ONES)) | (((high >> RUN) & ONES) << 2)
    elif START == SHIFT:
        return low & ((((1 << BITS) - 1) * ONES) << START)
    else:
        return (low >> (SHIFT - START)) & ((((1 << BITS) - 1) * ONES) << START)


@triton.jit
def field_start(RUN: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The bit at which :func:`fields` puts a field: where it is, if the mantissa holds it there; else 0, or where it comes
    to lie after the same shift by 8 as its neighbours'."""
    SHIFT: tl.constexpr = field_shift(RUN, BITS)
    if BITS == 3:
        return 0
    elif SHIFT + BITS <= MANTISSA:
        return SHIFT
    elif SHIFT >= 8 and SHIFT - 8 + BITS <= MANTISSA:
        return SHIFT - 8
    else:
        return 0


@triton.jit
def code_f32(low, high, zero, magic, RUN: tl.constexpr, BITS: tl.constexpr):
    """``code - zero`` as float32, exact; low and high are elements widened to int32.

    magic: ``MAGIC``, the bits of 2 ** 23. As an argument of the kernel it stays in a register, and "and" and "or" become one
    instruction, which has room for one constant only.
    """
    START: tl.constexpr = field_start(RUN, BITS, 23)
    # 2 ** (23 - START) has its bit START worth 1
    bits = fields(low, high, RUN, BITS, 1, 23) | (magic - (START << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - START)) + zero)


@triton.jit
def byte_f32(low, high, zero, mask, RUN: tl.constexpr, BITS: tl.constexpr):
    """``code - zero`` as float32 ``[..., 32]``, exact; low and high are words ``[..., 16]``.

    For AMD, which converts any byte of a word to float32 by one instruction, but has no "and, or" with constants: the codes
    of run r of two elements, and of the runs in the other bytes, are singled out in their bytes together.

    mask: the (low) bits of a code in each byte; an argument of the kernel, as the compiler would else mask every byte alone.
    """
    SHIFT: tl.constexpr = field_shift(RUN, BITS)
    FIRST: tl.constexpr = SHIFT // 8 * 8
    bytes4 = low
    if BITS == 3:
        bytes4 = (low >> SHIFT % 8) & mask
        if RUN % 8 < 2:
            bytes4 |= (high << (2 - RUN % 8)) & 0x04040404
        else:
            bytes4 |= (high >> (RUN % 8 - 2)) & 0x04040404
    elif BITS < 8:
        bytes4 = (low >> SHIFT % 8) & mask
    code = tl.join((bytes4 >> FIRST) & 255, (bytes4 >> (FIRST + 16)) & 255)
    return code.reshape(low.shape[0], low.shape[1], 2 * low.shape[2]).to(tl.float32) - zero


@triton.jit
def code_f16(low, high, zero, RUN: tl.constexpr, BITS: tl.constexpr):
    """``code - zero`` as float16 ``[rows, 32]``, exact; low and high are words ``[rows, 16]``."""
    START: tl.constexpr = field_start(RUN, BITS, 10)
    words = fields(low, high, RUN, BITS, 0x10001, 10) | (((25 - START) * 0x10001) << 10)
    return split_words(words).to(tl.float16, bitcast=True) - ((1 << (10 - START)) + zero)


@triton.jit
def code_bf16(low, high, zero, RUN: tl.constexpr, BITS: tl.constexpr):
    """``code - zero`` as bfloat16 ``[rows, 32]``, exact, of at most 4 bits; low and high are words ``[rows, 16]``."""
    START: tl.constexpr = field_start(RUN, BITS, 7)
    words = fields(low, high, RUN, BITS, 0x10001, 7) | (((134 - START) * 0x10001) << 7)
    return split_words(words).to(tl.bfloat16, bitcast=True) - ((1 << (7 - START)) + zero)


@triton.jit
def float8_f16(elements, RUN: tl.constexpr, KIND: tl.constexpr):
    """A float8 code as float16, exact but for a power of two: times ``float8_factor(KIND)`` it is the value.

    elements: int16; run 0 is the low byte, run 1 the high one. Integer arithmetic only, so it runs on every device, whether
    that knows float8 or not.
    """
    if RUN == 0:
        byte = elements << 8
    else:
        byte = elements & -256
    if KIND == "e5m2" or KIND == "finite_e5m2":
        return byte.to(tl.float16, bitcast=True)
    # sign, then exponent and mantissa one bit further down: an exponent of 4 bits in a field of 5
    magnitude = byte & 0x7F00
    bits = (byte & -32768) | (magnitude >> 1)
    value = bits.to(tl.float16, bitcast=True)
    if KIND == "finite_e4m3fn" or KIND == "finite_e4m3fnuz":
        return value
    if KIND == "e4m3fn":
        return tl.where(magnitude == 0x7F00, float("nan"), value)
    return tl.where(byte == -32768, float("nan"), value)  # e4m3fnuz: NaN stands where -0 would


@triton.jit
def float8_pairs(words, RUN: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    """Float8 codes of a run, none of which is NaN or infinity, as ``[rows, 32]`` in float16 or bfloat16, exact but for
    ``float8_factor(KIND)``; words are ``[rows, 16]``.

    Each instruction treats two: the exponent goes to the low end of the wider field, where it reads as a number too small by
    a power of two. In bfloat16 that is so small that sums would lose it, so it is multiplied here.
    """
    if RUN == 0:
        words = words << 8
    SIGN: tl.constexpr = -0x7FFF8000  # 0x80008000
    if dtype == tl.float16:
        if KIND == "finite_e5m2":
            bits = words & -0x00FF0100  # 0xff00ff00
        else:
            bits = ((words >> 1) & 0x3F803F80) | (words & SIGN)
        return split_words(bits).to(tl.float16, bitcast=True)
    else:
        if KIND == "finite_e5m2":
            bits = ((words >> 3) & 0x0FE00FE0) | (words & SIGN)
        else:
            bits = ((words >> 4) & 0x07F007F0) | (words & SIGN)
        small = split_words(bits).to(tl.bfloat16, bitcast=True)
        return small * tl.full((), 5192296858534827628530496329220096.0, tl.bfloat16)  # 2 ** 112


@triton.jit
def cut_bf16(v):
    """float32 that bfloat16 holds exactly, as bfloat16: its upper half. For devices that have no instruction that rounds."""
    return (v.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def float8_factor(KIND: tl.constexpr):
    """What :func:`float8_f16` is to be multiplied with; exponents are biased by 7 (fn), 8 (fnuz) and 15 (e5m2, float16)."""
    if KIND == "e4m3fn" or KIND == "finite_e4m3fn":
        return 256.0
    elif KIND == "e4m3fnuz" or KIND == "finite_e4m3fnuz":
        return 128.0
    else:
        return 1.0
