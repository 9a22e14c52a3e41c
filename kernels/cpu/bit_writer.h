// Codes as a stream of bits, the first in the lowest bits of the first byte (bits.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace qcompile {
namespace {

template <int kBits>
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}

  // The first `count` of 16 codes, each below 2^kBits.
  void put(const uint8_t* codes, int count) {
    if (count == kTile && held_ == 0) {
      if (kBits == 8) {
        std::memcpy(to_, codes, kTile);
        to_ += kTile;
        return;
      }
      for (int i = 0; i < kTile; i += 8) eight(codes + i);
      return;
    }
    for (int i = 0; i < count; ++i) {
      word_ |= uint32_t(codes[i]) << held_;
      for (held_ += kBits; held_ >= 8; held_ -= 8, word_ >>= 8) *to_++ = uint8_t(word_);
    }
  }

  // What is left, in a byte of its own.
  void finish() {
    if (held_ > 0) *to_ = uint8_t(word_);
  }

 private:
  // Neighbours are put together: of bytes, then of pairs, then of fours.
  void eight(const uint8_t* codes) {
    uint64_t w = 0;
    for (int i = 0; i < 8; ++i) w |= uint64_t(codes[i]) << (8 * i);
    w = (w & 0x00ff00ff00ff00ffu) | (w >> 8 & 0x00ff00ff00ff00ffu) << kBits;
    w = (w & 0x0000ffff0000ffffu) | (w >> 16 & 0x0000ffff0000ffffu) << 2 * kBits;
    w = (w & 0x00000000ffffffffu) | (w >> 32) << 4 * kBits;
    for (int i = 0; i < kBits; ++i) *to_++ = uint8_t(w >> (8 * i));
  }

  uint8_t* to_;
  int held_ = 0;
  uint32_t word_ = 0;
};

}  // namespace
}  // namespace qcompile
