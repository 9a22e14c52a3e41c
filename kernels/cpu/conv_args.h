// What a convolution asks of the kernels; a part of kernels.h, which includes it.
#pragma once

namespace qcompile {

// How a kernel moves over an image. Axis 0 is rows, 1 columns; a one-dimensional convolution has one row.
struct Window {
  int64_t batch, size[2], channels;          // of x
  int64_t out_size[2], out_channels;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t before[2];                         // zeros before the first row and column
  int64_t x_batch, x_channel, x_at[2];       // strides of x, in elements

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return batch * size[0] * size[1]; }
  int64_t positions() const { return batch * out_size[0] * out_size[1]; }
};

// How the columns of a packed weight are ordered.
enum class Order : int {
  kRows,      // channel, kernel row, kernel column: as the logical matrix
  kPatch,     // kernel row, kernel column, channel
  kChannels,  // channels of a group of scales, kernel row, kernel column, channel; channels padded to whole blocks
};

struct Conv {
  Weight w;  // rows: for each group of channels its outputs, padded to whole tiles
  Window window;
  Order order;
  int64_t groups;
  const char* x;
  DType dtype;  // of x, add and out
  const char* bias;  // [out_channels], or null
  DType bias_dtype;
  Activation activation, after;  // of the product and its bias; of the sum with `add`
  bool exact;
  const char* add;  // [positions, out_channels], or null
  char* out;        // [positions, out_channels]
  char* scratch;    // ConvPlan::bytes, 64-byte aligned
  int threads;
  ParallelFor parallel;
};

// One weight a tap and channel: codes [tiles, taps, 16], scale and zero [tiles, tap groups, 16].
struct Depthwise {
  const uint8_t* codes;
  const void* scale;
  const void* zero;  // or null
  DType scale_dtype;
  Zero zero_kind;
  float middle;  // the zero point where there is none
  int64_t groups, group_size;  // taps that share a scale
  Window window;
  const char* x;  // channels lie together
  DType dtype;
  const char* bias;
  DType bias_dtype;
  Activation activation, after;
  const char* add;
  char* out;
  ParallelFor parallel;
};

// How a convolution is divided: `slots` threads each take a share of row_blocks * splits pieces. A piece is a block of
// output positions times a share of a group's tiles. Byte offsets in scratch.
struct ConvPlan {
  int64_t depth;                 // columns with their padding
  int64_t group_tiles;           // tiles of a group of channels
  int64_t pixel_blocks;          // blocks of a pixel that was quantized beforehand; 0: none are
  int64_t row_block, row_blocks, splits, slots;
  size_t pixel_scale, pixel_sums, slot, slot_scale, slot_sums, slot_patch, slot_bytes, bytes;

  explicit ConvPlan(const Conv& a) {
    auto pad = [](size_t n) { return (n + 63) / 64 * 64; };
    const Window& v = a.window;
    const int64_t m = v.positions(), width = a.exact ? 4 : 1;
    depth = a.w.blocks * kBlock;
    group_tiles = a.w.tiles / a.groups;
    pixel_blocks = a.order == Order::kChannels && !a.exact ? a.groups * (a.w.blocks / v.taps()) : 0;
    int64_t rows = (int64_t(256) << 10) / (depth * width + a.w.blocks * 4 + 1);
    rows = rows > 128 ? 128 : rows < 4 * kMostRows ? 4 * kMostRows : rows;
    row_blocks = (m + rows - 1) / rows;
    splits = 1;
    if (row_blocks >= a.threads) {
      row_blocks = (row_blocks + a.threads - 1) / a.threads * a.threads;
    } else if (row_blocks > 0) {
      // few positions: threads share the rows of the weight, of which each is then read once
      splits = (a.threads + row_blocks * a.groups - 1) / (row_blocks * a.groups);
      splits = splits < group_tiles ? splits : group_tiles;
    }
    if (row_blocks < 1) row_blocks = 1;
    row_block = (m + row_blocks - 1) / row_blocks;
    row_block = (row_block + kMostRows - 1) / kMostRows * kMostRows;
    row_blocks = row_block > 0 ? (m + row_block - 1) / row_block : 0;
    slots = row_blocks * splits * a.groups;
    slots = slots < a.threads ? slots : a.threads;
    pixel_scale = pad(size_t(v.pixels() * pixel_blocks * kBlock));
    pixel_sums = pixel_scale + pad(size_t(v.pixels() * pixel_blocks) * 4);
    slot = pixel_sums + pad(size_t(v.pixels() * pixel_blocks) * 4);
    slot_scale = pad(size_t(row_block * depth * width));
    slot_sums = slot_scale + pad(size_t(row_block * a.w.blocks) * 4);
    slot_patch = slot_sums + pad(size_t(row_block * a.w.groups) * 4);
    slot_bytes = slot_patch + pad(size_t(depth) * 4);
    bytes = slot + size_t(slots) * slot_bytes;
  }
};

}  // namespace qcompile
