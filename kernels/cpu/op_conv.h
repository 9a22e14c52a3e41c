// The operators conv_tiled and conv_depthwise: checks, then the kernel.
#pragma once

#include "conv_args.h"
#include "op_checks.h"
#include "op_linear.h"

namespace qcompile {
namespace {

constexpr int64_t kMostTaps = 512;               // of a depthwise kernel; depthwise.h holds them in a fixed buffer
constexpr int64_t kMostSize = int64_t(1) << 30;     // of anything that sizes are multiplied with

template <class T>
std::vector<int64_t> sizes_of(const T& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

// Of a dense image whose channels lie together.
std::vector<int64_t> image_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  int64_t stride = shape[1];
  for (size_t i = shape.size(); i-- > 2; stride *= shape[i]) strides[i] = stride;
  strides[0] = stride;
  return strides;
}

// x with its channels together; x itself where they are, or where any strides do.
template <class Memory, class T = typename Memory::T>
T check_image(Memory& memory, const char* op, const T& x, size_t axes, bool together) {
  if (x.dim() != int64_t(axes) + 2) fail(op, "x must have ", axes + 2, " dimensions, got ", shape_of(x));
  if (!x.is_cpu()) fail(op, "x must be on the CPU like the weight");
  if (!together || x.size(1) == 1 || x.stride(1) == 1) return x;
  const auto shape = sizes_of(x);
  return memory.laid(x, shape, image_strides(shape));
}

template <class T>
Window check_window(const char* op, const T& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const size_t axes = weight.size() - 2, skip = 2 - axes;
  Window v{};
  v.batch = x.size(0);
  v.channels = x.size(1);
  v.out_channels = weight[0];
  v.x_batch = x.stride(0);
  v.x_channel = x.size(1) == 1 ? 1 : x.stride(1);
  if (groups < 1 || v.channels != weight[1] * groups || v.out_channels < 1 || v.out_channels % groups != 0)
    fail(op, "x has ", v.channels, " channels; a weight of ", weight[0], " x ", weight[1], " in ", groups, " groups takes ",
         weight[1] * groups);
  if (stride.size() != axes || dilation.size() != axes || padding.size() != 2 * axes)
    fail(op, "stride and dilation must have ", axes, " entries, padding ", 2 * axes);
  for (size_t i = 0; i < 2; ++i) {
    v.size[i] = v.out_size[i] = v.kernel[i] = v.stride[i] = v.dilation[i] = 1;
    if (i < skip) continue;
    const size_t k = i - skip;
    v.size[i] = x.size(int64_t(2 + k));
    v.x_at[i] = x.stride(int64_t(2 + k));
    v.kernel[i] = weight[2 + k];
    v.stride[i] = stride[k];
    v.dilation[i] = dilation[k];
    v.before[i] = padding[k];
    const int64_t after = padding[axes + k];
    for (int64_t n : {v.kernel[i], v.stride[i], v.dilation[i]})
      if (n < 1 || n > kMostSize) fail(op, "kernel sizes, stride and dilation must be positive, got ", n);
    if (v.before[i] < 0 || v.before[i] > kMostSize || after < 0 || after > kMostSize)
      fail(op, "padding must not be negative, got ", v.before[i], " and ", after);
    const int64_t room = v.size[i] + v.before[i] + after - v.dilation[i] * (v.kernel[i] - 1) - 1;
    if (room < 0) fail(op, "the kernel is larger than the padded x, ", shape_of(x));
    v.out_size[i] = room / v.stride[i] + 1;
  }
  return v;
}

void check_axes(const char* op, const std::vector<int64_t>& weight_shape) {
  if (weight_shape.size() != 3 && weight_shape.size() != 4)
    fail(op, "weight_shape must be [out, in / groups, *kernel] of one or two dimensions, got ", weight_shape.size(), " entries");
}

template <class Memory>
typename Memory::T make_image(Memory& memory, const Window& v, size_t axes, ScalarType dtype) {
  std::vector<int64_t> shape = {v.batch, v.out_channels};
  for (size_t i = 2 - axes; i < 2; ++i) shape.push_back(v.out_size[i]);
  return memory.make(shape, image_strides(shape), dtype);
}

// The scales of activations, and what is float: x, or the values of its codes. Returns the dtype of the result.
template <class T>
ScalarType check_scales(const char* op, const T& x, const std::optional<T>& x_scale, const std::optional<T>& out_scale,
                        std::optional<ScalarType> dtype, Image& a) {
  a.x_scale = x_scale ? check_scale(op, "x_scale", *x_scale) : 0.0f;
  a.out_scale = out_scale ? check_scale(op, "out_scale", *out_scale) : 0.0f;
  a.x_codes = x.scalar_type() == ScalarType::Char;
  if (a.x_codes && !x_scale) fail(op, "x is int8: give the x_scale of its codes");
  if (a.x_codes && !dtype) fail(op, "x is int8: give the dtype of its values");
  if (!a.x_codes && dtype && *dtype != x.scalar_type()) fail(op, "dtype must be that of x, or None");
  const ScalarType values = a.x_codes ? *dtype : x.scalar_type();
  a.dtype = check_float(op, a.x_codes ? "dtype" : "x", values);
  return values;
}

// The residual, laid out as the result; null where there is none. What is copied stays in `add`.
template <class Memory, class T = typename Memory::T>
const char* check_add(Memory& memory, const char* op, std::optional<T>& add, ScalarType dtype, const T& out) {
  if (!add) return nullptr;
  const auto shape = sizes_of(out);
  check_shape(op, "add", *add, shape);
  if (add->scalar_type() != dtype) fail(op, "add must have the dtype of x");
  if (!add->is_cpu()) fail(op, "add must be on the CPU like x");
  bool same = true;
  for (int64_t i = 0; i < out.dim(); ++i) same = same && (out.size(i) == 1 || add->stride(i) == out.stride(i));
  if (!same) add = memory.laid(*add, shape, image_strides(shape));
  return bytes(*add);
}

Order check_order(const char* op, const std::string& name) {
  static const char* const kNames[] = {"rows", "patch", "channels"};
  for (int i = 0; i < 3; ++i)
    if (name == kNames[i]) return Order(i);
  fail(op, "order must be one of rows, patch, channels, got '", name, "'");
}

// Columns of the packed weight of one group of channels.
int64_t packed_columns(const char* op, Order order, const std::vector<int64_t>& weight, int64_t taps, int64_t& group_size) {
  if (order != Order::kChannels) return weight[1] * taps;
  const int64_t padded = (weight[1] + kBlock - 1) / kBlock * kBlock;
  if (group_size % (kBlock * taps) != 0)
    fail(op, "order 'channels' needs groups of whole blocks of channels: multiples of ", kBlock * taps, ", got ", group_size);
  return padded * taps;
}

bool is_pointwise(const std::vector<int64_t>& weight_shape) {
  for (size_t i = 2; i < weight_shape.size(); ++i)
    if (weight_shape[i] != 1) return false;
  return true;
}

// What surrounds the sums, and the result, not filled in; the window is known.
template <class Memory, class T = typename Memory::T>
T set_around(Memory& memory, const char* op, size_t axes, ScalarType dtype, const std::optional<T>& bias,
             const std::string& activation, std::optional<T>& add, const std::string& after, Image& a) {
  a.activation = check_activation(op, activation);
  a.after = check_activation(op, after);
  a.bias = check_bias(op, bias, dtype, a.window.out_channels, a.bias_dtype);
  const T out = make_image(memory, a.window, axes, a.out_scale > 0.0f ? ScalarType::Char : dtype);
  a.add = check_add(memory, op, add, dtype, out);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  a.threads = int(torch::stable::get_num_threads());
  a.parallel = parallel;
  return out;
}

template <class Memory, class T = typename Memory::T>
T conv_tiled(Memory& memory, const T& x, const T& codes, const T& scale, const std::optional<T>& zero,
             const std::optional<T>& bias, int64_t bits, int64_t group_size, const std::string& order,
             const std::vector<int64_t>& weight_shape, const std::vector<int64_t>& stride,
             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
             const std::string& activation, std::optional<T> add, const std::string& after, bool exact,
             const std::optional<T>& x_scale, const std::optional<T>& out_scale,
             std::optional<ScalarType> dtype) {
  const char* op = "conv_tiled";
  check_axes(op, weight_shape);
  const size_t axes = weight_shape.size() - 2;
  Conv a{};
  if (exact && x_scale) fail(op, "give one of exact and x_scale");
  if (out_scale && !x_scale) fail(op, "out_scale goes with x_scale");
  const ScalarType values = check_scales(op, x, x_scale, out_scale, dtype, a);
  a.order = check_order(op, order);
  const bool by_channel = a.order != Order::kRows || is_pointwise(weight_shape);
  const T image = check_image(memory, op, x, axes, x_scale ? a.x_codes : by_channel);
  a.window = check_window(op, image, weight_shape, stride, padding, dilation, groups);
  a.groups = groups;
  const int64_t cols = packed_columns(op, a.order, weight_shape, a.window.taps(), group_size);
  const int64_t tiles = (weight_shape[0] / groups + kTile - 1) / kTile * groups;
  a.w = check_weight(op, codes, scale, zero, bits, group_size, tiles, cols);
  a.x = bytes(image);
  a.exact = exact;
  const T out = set_around(memory, op, axes, values, bias, activation, add, after, a);
  if (a.window.positions() == 0) return out;
  const Scratch scratch(x_scale ? CodesPlan(a).bytes : ConvPlan(a).bytes);
  a.scratch = scratch.data();
  x_scale ? kernels().conv_codes(a) : kernels().conv(a);
  return out;
}

template <class Memory, class T = typename Memory::T>
T conv_depthwise(Memory& memory, const T& x, const T& codes, const T& scale, const std::optional<T>& zero,
                 const std::optional<T>& bias, int64_t bits, int64_t group_size,
                 const std::vector<int64_t>& weight_shape, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 const std::string& activation, std::optional<T> add, const std::string& after,
                 const std::optional<T>& x_scale, const std::optional<T>& out_scale,
                 std::optional<ScalarType> dtype) {
  const char* op = "conv_depthwise";
  check_axes(op, weight_shape);
  const size_t axes = weight_shape.size() - 2;
  const T image = check_image(memory, op, x, axes, true);
  Depthwise a{};
  const ScalarType values = check_scales(op, x, x_scale, out_scale, dtype, a);
  if (weight_shape[1] != 1) fail(op, "a depthwise weight has one input channel a group, got ", weight_shape[1]);
  a.window = check_window(op, image, weight_shape, stride, padding, dilation, weight_shape[0]);
  const int64_t taps = a.window.taps(), tiles = (weight_shape[0] + kTile - 1) / kTile;
  if (taps > kMostTaps) fail(op, "a kernel may have ", kMostTaps, " positions, got ", taps);
  if (bits < 2 || bits > 8) fail(op, "bits must be 2 to 8, got ", bits);
  if (group_size < 0) fail(op, "group_size must be positive, or 0 for one group a row, got ", group_size);
  a.group_size = group_size > 0 && group_size < taps ? group_size : taps;
  a.groups = (taps + a.group_size - 1) / a.group_size;
  if (codes.scalar_type() != ScalarType::Byte) fail(op, "codes must be uint8");
  check_shape(op, "codes", codes, {tiles, taps, kTile});
  check_memory(op, "codes", codes);
  a.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  a.scale_dtype = check_float(op, "scale", scale.scalar_type());
  check_shape(op, "scale", scale, {tiles, a.groups, kTile});
  check_memory(op, "scale", scale);
  a.scale = scale.const_data_ptr();
  a.middle = float(1 << (bits - 1));
  a.zero_kind = Zero::kMiddle;
  if (zero) {
    const bool codes_unit = zero->scalar_type() == ScalarType::Byte;
    if (!codes_unit && zero->scalar_type() != scale.scalar_type())
      fail(op, "zero must be uint8 (code units) or have the dtype of scale (a shift)");
    check_shape(op, "zero", *zero, {tiles, a.groups, kTile});
    check_memory(op, "zero", *zero);
    a.zero = zero->const_data_ptr();
    a.zero_kind = codes_unit ? Zero::kCode : Zero::kShift;
  }
  a.x = bytes(image);
  const T out = set_around(memory, op, axes, values, bias, activation, add, after, a);
  if (a.window.positions() == 0) return out;
  const Scratch scratch(DepthwisePlan(a).bytes);
  a.scratch = scratch.data();
  kernels().depthwise(a);
  return out;
}

}  // namespace
}  // namespace qcompile
