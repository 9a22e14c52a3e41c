// What a convolution asks of the kernels; a part of kernels.h, which includes it.
#pragma once

namespace qcompile {

constexpr int64_t kMostTiles = 3;  // tiles of the weight that are multiplied together

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

// What convolutions have in common: an image, how it is moved over, and what becomes of the sums.
struct Image {
  Window window;
  const char* x;
  DType dtype;       // of floats: x where it is no codes, add, and out where it is none
  bool x_codes;      // x is int8, with x_scale, its channels together
  float x_scale;     // of all activations where it is known beforehand, else 0
  float out_scale;   // out is int8 with this scale; 0: floats
  const char* bias;  // [out_channels], or null
  DType bias_dtype;
  Activation activation, after;  // of the sum and its bias; of that and `add`
  const char* add;               // [positions, out_channels], or null
  char* out;                     // [positions, out_channels]
  char* scratch;                 // as much as the plan says, 64-byte aligned
  int threads;
  ParallelFor parallel;
};

struct Conv : Image {
  Weight w;  // rows: for each group of channels its outputs, padded to whole tiles
  Order order;
  int64_t groups;
  bool exact;
};

// One weight a tap and channel: codes [tiles, taps, 16], scale and zero [tiles, tap groups, 16]. The channels of x lie together.
struct Depthwise : Image {
  const uint8_t* codes;
  const void* scale;
  const void* zero;  // or null
  DType scale_dtype;
  Zero zero_kind;
  float middle;  // the zero point where there is none
  int64_t groups, group_size;  // taps that share a scale
};

// How a convolution is divided: `slots` threads each take a share of the pieces. A piece is a block of output positions
// times a share of a group's tiles.
struct ConvShares {
  static constexpr int64_t kSharedRows = 96;  // positions for which a tile of the weight is made ready without regret
  int64_t groups, positions;
  int64_t group_tiles;  // tiles of a group of channels
  int64_t row_block, row_blocks, splits, pieces, slots;

  // rows: the positions of a block that the cache keeps, and the most of them; wanted: pieces, of which threads take turns.
  ConvShares(const Conv& a, int64_t rows, int64_t most, int64_t wanted = 0)
      : groups(a.groups), positions(a.window.positions()), group_tiles(a.w.tiles / a.groups), splits(1) {
    rows = rows > most ? most : rows < 4 * kMostRows ? 4 * kMostRows : rows;
    row_blocks = (positions + rows - 1) / rows;
    if (row_blocks >= a.threads) {
      row_blocks = (row_blocks + a.threads - 1) / a.threads * a.threads;
    } else if (row_blocks > 0) {
      // few positions: threads share the rows of the weight, of which each is then read once
      splits = (a.threads + row_blocks * groups - 1) / (row_blocks * groups);
      splits = splits < group_tiles ? splits : group_tiles;
    }
    if (positions > 0 && wanted > row_blocks * splits * groups) {
      const auto at_most = [](int64_t n, int64_t most) { return n < most ? n : most; };
      const int64_t shares = at_most((wanted - 1) / (row_blocks * groups) + 1, group_tiles / kMostTiles);
      splits = splits > shares ? splits : shares;
      const int64_t blocks = at_most((wanted - 1) / (splits * groups) + 1, positions / kSharedRows);
      row_blocks = row_blocks > blocks ? row_blocks : blocks;
    }
    if (row_blocks < 1) row_blocks = 1;
    row_block = (positions + row_blocks - 1) / row_blocks;
    row_block = (row_block + kMostRows - 1) / kMostRows * kMostRows;
    row_blocks = row_block > 0 ? (positions + row_block - 1) / row_block : 0;
    pieces = row_blocks * splits * groups;
    slots = pieces < a.threads ? pieces : a.threads;
  }

  struct Piece {
    int64_t block;     // of positions and a group; its pieces follow one another
    int64_t group, m0;
    int rows;          // from m0 on
    int64_t from, to;  // tiles of the group
  };
  Piece piece(int64_t i) const {
    const int64_t split = i % splits, block = i / splits, m0 = block / groups * row_block;
    const int64_t rows = row_block < positions - m0 ? row_block : positions - m0;
    return {block, block % groups, m0, int(rows), group_tiles * split / splits, group_tiles * (split + 1) / splits};
  }
};

// The shares, and byte offsets in scratch.
struct ConvPlan : ConvShares {
  int64_t depth;                 // columns with their padding
  int64_t tap_blocks;            // blocks of a tap, where columns are in that order
  int64_t pixel_blocks;          // blocks of a pixel that was quantized beforehand; 0: none are
  size_t pixel_scale, pixel_first, slot, slot_scale, slot_sums, slot_first, slot_patch, slot_bytes, bytes;

  explicit ConvPlan(const Conv& a)
      : ConvShares(a, (int64_t(256) << 10) / (a.w.blocks * (kBlock * (a.exact ? 4 : 1) + 4) + 1), 128) {
    auto pad = [](size_t n) { return (n + 63) / 64 * 64; };
    const Window& v = a.window;
    const int64_t width = a.exact ? 4 : 1;
    depth = a.w.blocks * kBlock;
    tap_blocks = a.w.blocks / v.taps();
    pixel_blocks = a.order == Order::kChannels && !a.exact ? a.groups * tap_blocks : 0;
    pixel_scale = pad(size_t(v.pixels() * pixel_blocks * kBlock));
    pixel_first = pixel_scale + pad(size_t(v.pixels() * pixel_blocks) * 4);
    slot = pixel_first + pad(size_t(v.pixels() * pixel_blocks) * 4);
    slot_scale = pad(size_t(row_block * depth * width));
    slot_sums = slot_scale + pad(size_t(row_block * a.w.blocks) * 4);
    slot_first = slot_sums + pad(size_t(row_block * a.w.groups) * 4);
    slot_patch = slot_first + (a.exact ? 0 : pad(size_t(row_block * (a.w.blocks + 1)) * 4));
    slot_bytes = slot_patch + pad(size_t(kMostRows * (depth + kTile)) * 4);  // a vector may begin at a row's last value
    bytes = slot + size_t(slots) * slot_bytes;
  }
};

// The same where activations have one scale that is known.
struct CodesPlan : ConvShares {
  bool image;  // x becomes int8 as a whole beforehand, and lies first in scratch; else it is that, or becomes it row by row
  int64_t depth;
  int64_t patch;  // a row before it is cut into blocks, and what is written beyond it
  size_t slot, slot_sums, slot_slab, slot_scale, slot_start, slot_flags, slot_patch, slot_bytes, bytes;

  explicit CodesPlan(const Conv& a)
      : ConvShares(a, (int64_t(192) << 10) / (a.w.blocks * kBlock + 1), 256, a.threads > 1 ? 4 * a.threads : 0) {
    auto pad = [](size_t n) { return (n + 63) / 64 * 64; };
    const Window& v = a.window;
    depth = a.w.blocks * kBlock;
    image = !a.x_codes && !(v.taps() == 1 && v.x_channel == 1);
    slot = image ? pad(size_t(v.pixels() * v.channels)) : 0;
    slot_sums = pad(size_t(row_block * depth));
    slot_slab = slot_sums + pad(size_t(row_block * a.w.groups) * 4);
    slot_scale = slot_slab + size_t(kMostTiles * a.w.blocks) * 512;
    slot_start = slot_scale + size_t(kMostTiles * a.w.groups) * kTile * 4;
    slot_flags = slot_start + size_t(kMostTiles * a.w.groups) * kTile * 4;
    slot_patch = slot_flags + pad(size_t(row_block));
    patch = int64_t(pad(size_t(depth) + kBlock));
    slot_bytes = slot_patch + size_t(kMostRows * patch);
    bytes = slot + size_t(slots) * slot_bytes;
  }
};

// How a depthwise convolution is divided: an image, a band of output rows, a segment of columns, 64 channels, which are a line
// of the cache. What a unit reads stays in the L2 cache while its tiles of 16 channels pass over it, and units side by side
// write to different lines.
struct DepthwisePlan {
  static constexpr int64_t kSegment = 128;  // the most columns of a segment
  static constexpr int64_t kTogether = 4;   // tiles
  int64_t tiles, groups, band, bands, segment, segments, units, slots;
  int64_t extent;  // rows of x under the kernel
  int64_t width;   // columns of x under the kernel along a segment
  size_t slot_bytes, bytes;

  explicit DepthwisePlan(const Depthwise& a) {
    const Window& v = a.window;
    auto up = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
    tiles = up(v.channels, kTile);
    groups = up(tiles, kTogether);
    segments = up(v.out_size[1], kSegment);
    segment = up(v.out_size[1], segments);
    segments = up(v.out_size[1], segment);
    const int64_t share = up(v.out_size[0], up(4 * a.threads, groups * v.batch * segments));
    const int64_t cached = (int64_t(128) << 10) / (segment * v.stride[0] * v.stride[1] * kTogether * kTile);
    band = share < cached ? share : cached;
    band = band < 4 ? 4 : band;  // a unit reads the rows above it again
    bands = up(v.out_size[0], band);
    band = up(v.out_size[0], bands);
    bands = up(v.out_size[0], band);
    units = groups * v.batch * bands * segments;
    slots = units < a.threads ? units : a.threads;
    extent = (v.kernel[0] - 1) * v.dilation[0] + 1;
    width = (segment - 1) * v.stride[1] + (v.kernel[1] - 1) * v.dilation[1] + 1;
    slot_bytes = size_t(extent * width) * kTile * 4;
    bytes = size_t(slots) * slot_bytes;
  }
};

}  // namespace qcompile
