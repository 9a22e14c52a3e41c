// Registers the operators on the CPU key with torch's stable ABI. Everything that a kernel trusts is checked here: every
// dtype, device, shape and index, before memory is touched. Schemas and references are in kernels/ops/*_tiled.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace qcompile {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream s;
  s << "qcompile::" << op << ": ";
  (s << ... << args);
  throw std::runtime_error(s.str());
}

std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (same) return;
  std::ostringstream s;
  for (size_t i = 0; i < shape.size(); ++i) s << (i ? ", " : "") << shape[i];
  fail(op, name, " must be [", s.str(), "], got ", shape_of(t));
}

void check_memory(const char* op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, name, " must be on the CPU like the other tensors");
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

std::optional<DType> float_type(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return std::nullopt;
  }
}

DType check_float(const char* op, const char* name, ScalarType t) {
  const auto r = float_type(t);
  if (!r) fail(op, name, " must be float32, float16 or bfloat16");
  return *r;
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

Tensor make(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle h = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &h));
  return Tensor(h);
}

Tensor make(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return make(shape, strides, dtype);
}

void parallel(int64_t total, int64_t grain, Body body, void* context) {
  if (total <= grain) {  // not worth waking a thread, nor a call into torch
    if (total > 0) body(0, total, context);
    return;
  }
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// A 64-byte aligned buffer a thread keeps between calls, given back when it was unusually large.
class Scratch {
 public:
  explicit Scratch(size_t n) {
    if (n > slot().size) {
      slot().memory.reset();
      slot().size = 0;
      void* p = std::aligned_alloc(64, (n + 63) / 64 * 64);
      if (p == nullptr) throw std::bad_alloc();
      slot().memory.reset(static_cast<char*>(p));
      slot().size = n;
    }
  }
  ~Scratch() {
    if (slot().size > (size_t(16) << 20)) slot() = {};
  }
  char* data() const { return slot().memory.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Slot {
    std::unique_ptr<char, Free> memory;
    size_t size = 0;
  };
  static Slot& slot() {
    thread_local Slot s;
    return s;
  }
};

Weight check_weight(const char* op, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                    int64_t bits, int64_t group_size, int64_t tiles, int64_t cols) {
  if (bits != 2 && bits != 4 && bits != 8) fail(op, "bits must be 2, 4 or 8, got ", bits);
  if (group_size < 0) fail(op, "group_size must be positive, or 0 for one group a row, got ", group_size);
  if (cols < 0 || cols > std::numeric_limits<int32_t>::max()) fail(op, "the weight cannot have ", cols, " columns");
  Weight w{};
  w.bits = int(bits);
  w.tiles = tiles;
  w.cols = cols;
  w.group_size = group_size > 0 && group_size < cols ? group_size : cols;
  w.groups = cols > 0 ? (cols + w.group_size - 1) / w.group_size : 0;
  w.blocks_per_group = (w.group_size + kBlock - 1) / kBlock;
  if (w.groups > 0) {
    const int64_t last = cols - (w.groups - 1) * w.group_size;
    w.blocks = (w.groups - 1) * w.blocks_per_group + (last + kBlock - 1) / kBlock;
  }
  if (codes.scalar_type() != ScalarType::Byte) fail(op, "codes must be uint8");
  check_shape(op, "codes", codes, {tiles, w.blocks, 64 * bits});
  check_memory(op, "codes", codes);
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  w.scale_dtype = check_float(op, "scale", scale.scalar_type());
  check_shape(op, "scale", scale, {tiles, w.groups, kTile});
  check_memory(op, "scale", scale);
  w.scale = scale.const_data_ptr();
  w.zero_kind = Zero::kMiddle;
  if (zero) {
    const bool codes_unit = zero->scalar_type() == ScalarType::Byte;
    if (!codes_unit && zero->scalar_type() != scale.scalar_type())
      fail(op, "zero must be uint8 (code units) or have the dtype of scale (a shift)");
    check_shape(op, "zero", *zero, {tiles, w.groups, kTile});
    check_memory(op, "zero", *zero);
    w.zero = zero->const_data_ptr();
    w.zero_kind = codes_unit ? Zero::kCode : Zero::kShift;
  }
  return w;
}

Activation check_activation(const char* op, const std::string& name) {
  static const char* const kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"};
  for (int i = 0; i < 7; ++i)
    if (name == kNames[i]) return Activation(i);
  fail(op, "activation must be one of none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, got '", name, "'");
}

// Checks x and fills in what linear_tiled and linear_tiled_split share. Returns x, contiguous.
Tensor check_input(const char* op, const Tensor& x, Linear& a) {
  a.dtype = check_float(op, "x", x.scalar_type());
  if (x.dim() < 1) fail(op, "x must be [..., in_features], got a scalar");
  if (!x.is_cpu()) fail(op, "x must be on the CPU like the weight");
  a.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) a.m *= x.size(i);
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

const char* check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t size, Linear& a) {
  if (!bias) return nullptr;
  check_shape(op, "bias", *bias, {size});
  check_memory(op, "bias", *bias);
  if (bias->scalar_type() != ScalarType::Float && bias->scalar_type() != x.scalar_type())
    fail(op, "bias must be float32 or have the dtype of x");
  a.bias_dtype = *float_type(bias->scalar_type());
  return bytes(*bias);
}

// Runs the kernel over all rows, in pieces whose scratch stays small.
void run(Linear a, std::vector<Part> parts) {
  constexpr size_t kScratch = size_t(64) << 20;
  a.parts = parts.data();
  a.part_count = int64_t(parts.size());
  a.parallel = parallel;
  a.threads = int(torch::stable::get_num_threads());
  const Kernels& k = kernels();
  const size_t per_row = ScratchPlan(a.w, 64, a.exact).bytes / 64 + 1;
  const int64_t most = int64_t(kScratch / per_row) < 128 ? 128 : int64_t(kScratch / per_row);
  const int64_t size = int64_t(element_size(a.dtype));
  for (int64_t left = a.m; left > 0; left -= most) {
    a.m = left < most ? left : most;
    const Scratch scratch(ScratchPlan(a.w, a.m, a.exact).bytes);
    a.scratch = scratch.data();
    k.linear(a);
    a.x += a.m * a.w.cols * size;
    for (Part& p : parts) p.out = static_cast<char*>(p.out) + a.m * p.rows * size;
    if (a.mul != nullptr) a.mul += a.m * parts[0].rows * size;
    if (a.add != nullptr) a.add += a.m * parts[0].rows * size;
  }
}

std::vector<int64_t> output_shape(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(rows);
  return shape;
}

Tensor linear_tiled(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                    const std::optional<Tensor>& bias, int64_t bits, int64_t group_size, int64_t out_features,
                    const std::string& activation, const std::optional<Tensor>& mul, const std::optional<Tensor>& add,
                    bool glu, bool exact) {
  const char* op = "linear_tiled";
  Linear a{};
  const Tensor input = check_input(op, x, a);
  if (out_features < 1 || out_features > std::numeric_limits<int32_t>::max())
    fail(op, "out_features must be positive, got ", out_features);
  a.units = (out_features + kTile - 1) / kTile;
  a.w = check_weight(op, codes, scale, zero, bits, group_size, a.units * (glu ? 2 : 1), x.size(x.dim() - 1));
  a.x = bytes(input);
  a.activation = check_activation(op, activation);
  a.glu = glu;
  a.exact = exact;
  const auto shape = output_shape(x, out_features);
  std::optional<Tensor> operands[2] = {mul, add};
  const char* names[2] = {"mul", "add"};
  for (int i = 0; i < 2; ++i) {
    if (!operands[i]) continue;
    check_shape(op, names[i], *operands[i], shape);
    if (operands[i]->scalar_type() != x.scalar_type()) fail(op, names[i], " must have the dtype of x");
    if (!operands[i]->is_cpu()) fail(op, names[i], " must be on the CPU like x");
    if (!operands[i]->is_contiguous()) operands[i] = torch::stable::contiguous(*operands[i]);
    (i == 0 ? a.mul : a.add) = bytes(*operands[i]);
  }
  const Tensor out = make(shape, x.scalar_type());
  Part part{0, out_features, out.mutable_data_ptr(), nullptr, nullptr};
  part.bias = check_bias(op, bias, x, out_features * (glu ? 2 : 1), a);
  if (glu && part.bias != nullptr) part.bias_up = part.bias + out_features * int64_t(element_size(a.bias_dtype));
  run(a, {part});
  return out;
}

// A scalar that is a scale: positive, and its reciprocal finite.
float check_scale(const char* op, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || t.dim() != 0) fail(op, "x_scale must be a float32 scalar, got ", shape_of(t));
  check_memory(op, "x_scale", t);
  const float value = *static_cast<const float*>(t.const_data_ptr());
  if (!(value >= 1e-36f && value <= 1e36f)) fail(op, "x_scale must be in [1e-36, 1e36], got ", value);
  return value;
}

Tensor linear_tiled_static(const Tensor& x, const Tensor& x_scale, const Tensor& codes, const Tensor& scale,
                           const std::optional<Tensor>& zero, const std::optional<Tensor>& bias, int64_t bits,
                           int64_t group_size, int64_t out_features) {
  const char* op = "linear_tiled_static";
  Linear a{};
  const Tensor input = check_input(op, x, a);
  if (out_features < 1 || out_features > std::numeric_limits<int32_t>::max())
    fail(op, "out_features must be positive, got ", out_features);
  a.x_scale = check_scale(op, x_scale);
  a.units = (out_features + kTile - 1) / kTile;
  a.w = check_weight(op, codes, scale, zero, bits, group_size, a.units, x.size(x.dim() - 1));
  a.x = bytes(input);
  const Tensor out = make(output_shape(x, out_features), x.scalar_type());
  Part part{0, out_features, out.mutable_data_ptr(), nullptr, nullptr};
  part.bias = check_bias(op, bias, x, out_features, a);
  run(a, {part});
  return out;
}

std::vector<Tensor> linear_tiled_split(const Tensor& x, const Tensor& codes, const Tensor& scale,
                                       const std::optional<Tensor>& zero, const std::optional<Tensor>& bias,
                                       int64_t bits, int64_t group_size, const std::vector<int64_t>& sizes, bool exact) {
  const char* op = "linear_tiled_split";
  Linear a{};
  const Tensor input = check_input(op, x, a);
  int64_t rows = 0;
  for (int64_t s : sizes) {
    if (s < 1 || s > std::numeric_limits<int32_t>::max()) fail(op, "sizes must be positive row counts, got ", s);
    a.units += (s + kTile - 1) / kTile;
    rows += s;
  }
  if (sizes.empty()) fail(op, "sizes must name at least one part");
  a.w = check_weight(op, codes, scale, zero, bits, group_size, a.units, x.size(x.dim() - 1));
  a.x = bytes(input);
  a.exact = exact;
  const char* bias_at = check_bias(op, bias, x, rows, a);
  std::vector<Tensor> outputs;
  std::vector<Part> parts;
  int64_t unit = 0;
  for (int64_t s : sizes) {
    outputs.push_back(make(output_shape(x, s), x.scalar_type()));
    parts.push_back({unit, s, outputs.back().mutable_data_ptr(), bias_at, nullptr});
    unit += (s + kTile - 1) / kTile;
    if (bias_at != nullptr) bias_at += s * int64_t(element_size(a.bias_dtype));
  }
  run(a, parts);
  return outputs;
}

Tensor embedding_tiled(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                       const std::optional<Tensor>& zero, int64_t bits, int64_t group_size, int64_t num_embeddings,
                       int64_t embedding_dim, ScalarType dtype) {
  const char* op = "embedding_tiled";
  if (num_embeddings < 1 || num_embeddings > std::numeric_limits<int32_t>::max())
    fail(op, "num_embeddings must be positive, got ", num_embeddings);
  Decode d{};
  d.w = check_weight(op, codes, scale, zero, bits, group_size, (num_embeddings + kTile - 1) / kTile, embedding_dim);
  d.dtype = check_float(op, "dtype", dtype);
  d.wide_indices = indices.scalar_type() == ScalarType::Long;
  if (!d.wide_indices && indices.scalar_type() != ScalarType::Int) fail(op, "indices must be int64 or int32");
  if (!indices.is_cpu()) fail(op, "indices must be on the CPU like the table");
  // A copy, so that nobody can change an index between its check and its use.
  d.count = indices.numel();
  const Tensor flat = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  std::vector<int64_t> rows(static_cast<size_t>(d.count));
  for (int64_t i = 0; i < d.count; ++i) {
    const int64_t row = d.wide_indices ? static_cast<const int64_t*>(flat.const_data_ptr())[i]
                                       : static_cast<const int32_t*>(flat.const_data_ptr())[i];
    if (row < 0 || row >= num_embeddings)
      fail(op, "index ", row, " at position ", i, " is out of range, allowed is 0..", num_embeddings - 1);
    rows[size_t(i)] = row;
  }
  d.indices = rows.data();
  d.wide_indices = true;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
  shape.push_back(embedding_dim);
  const Tensor out = make(shape, dtype);
  d.out = static_cast<char*>(out.mutable_data_ptr());
  d.parallel = parallel;
  kernels().decode(d);
  return out;
}

Tensor dequantize_tiled(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero, int64_t bits,
                        int64_t group_size, int64_t rows, int64_t cols, ScalarType dtype) {
  const char* op = "dequantize_tiled";
  Decode d{};
  if (codes.dim() != 3) fail(op, "codes must be [tiles, blocks, 64 * bits], got ", shape_of(codes));
  d.w = check_weight(op, codes, scale, zero, bits, group_size, codes.size(0), cols);
  if (rows < 0 || rows > d.w.tiles * kTile)
    fail(op, "rows must be in 0..", d.w.tiles * kTile, " (16 a tile), got ", rows);
  d.dtype = check_float(op, "dtype", dtype);
  d.count = rows;
  const Tensor out = make({rows, cols}, dtype);
  d.out = static_cast<char*>(out.mutable_data_ptr());
  d.parallel = parallel;
  kernels().decode(d);
  return out;
}

// Byte strides of batch, head and position, and where the data begins. Returns what holds it: t, or a copy of it.
Tensor check_heads(const char* name, const Tensor& t, const std::vector<int64_t>& shape, const Tensor& q,
                   const char*& data, int64_t* strides) {
  const char* op = "attention";
  check_shape(op, name, t, shape);
  if (t.scalar_type() != q.scalar_type()) fail(op, name, " must have the dtype of q");
  if (!t.is_cpu()) fail(op, name, " must be on the CPU like q");
  const Tensor held = t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  for (int i = 0; i < 3; ++i) strides[i] = held.stride(i) * int64_t(held.element_size());
  data = bytes(held);
  return held;
}

void check_mask(const Tensor& mask, const Tensor& q, Attention& a) {
  const char* op = "attention";
  const int64_t shape[4] = {a.batch, a.heads, a.queries, a.keys};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    const int64_t axis = 4 - mask.dim() + i, size = mask.size(i);
    fits = size == 1 || size == shape[axis];
    a.mask_stride[axis] = size == 1 ? 0 : mask.stride(i) * int64_t(mask.element_size());
  }
  if (!fits)
    fail(op, "mask must broadcast to [", a.batch, ", ", a.heads, ", ", a.queries, ", ", a.keys, "], got ", shape_of(mask));
  if (!mask.is_cpu()) fail(op, "mask must be on the CPU like q");
  a.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!a.mask_is_bool) {
    if (mask.scalar_type() != ScalarType::Float && mask.scalar_type() != q.scalar_type())
      fail(op, "mask must be bool, float32 or have the dtype of q");
    a.mask_dtype = *float_type(mask.scalar_type());
  }
  a.mask = bytes(mask);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double scale) {
  const char* op = "attention";
  Attention a{};
  a.dtype = check_float(op, "q", q.scalar_type());
  for (const Tensor* t : {&q, &k, &v})
    if (t->dim() != 4) fail(op, "q, k and v must be [batch, heads, positions, head size], got ", shape_of(*t));
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.dim = q.size(3);
  a.kv_heads = k.size(1), a.keys = k.size(2), a.value_dim = v.size(3);
  if (a.dim < 1 || a.dim > kRowFloats || a.value_dim < 1 || a.value_dim > kRowFloats)
    fail(op, "head sizes must be in 1..", kRowFloats, ", got ", a.dim, " and ", a.value_dim);
  if (a.kv_heads > 0 ? a.heads % a.kv_heads != 0 : a.heads != 0)
    fail(op, "the heads of q must be a multiple of those of k and v, got ", a.heads, " and ", a.kv_heads);
  const Tensor held[3] = {
      check_heads("q", q, {a.batch, a.heads, a.queries, a.dim}, q, a.q, a.q_stride),
      check_heads("k", k, {a.batch, a.kv_heads, a.keys, a.dim}, q, a.k, a.k_stride),
      check_heads("v", v, {a.batch, a.kv_heads, a.keys, a.value_dim}, q, a.v, a.v_stride),
  };
  if (mask) check_mask(*mask, q, a);
  a.scale = float(scale);
  // in memory [batch, queries, heads, value_dim], so that merging the heads, which comes next, moves nothing
  auto size = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t position = size(a.heads) * a.value_dim;
  const std::vector<int64_t> strides = {size(a.queries) * position, a.value_dim, position, 1};
  const Tensor out = make({a.batch, a.heads, a.queries, a.value_dim}, strides, q.scalar_type());
  for (int i = 0; i < 3; ++i) a.out_stride[i] = strides[size_t(i)] * int64_t(element_size(a.dtype));
  a.out = static_cast<char*>(out.mutable_data_ptr());
  a.threads = int(torch::stable::get_num_threads());
  a.parallel = parallel;
  const Scratch scratch(AttentionPlan(a).bytes);
  a.scratch = scratch.data();
  kernels().attention(a);
  return out;
}

}  // namespace
}  // namespace qcompile

STABLE_TORCH_LIBRARY_IMPL(qcompile, CPU, m) {
  // the operators with an autograd formula, and the bare ones they compute through
  for (const char* name : {"linear_tiled", "linear_tiled_forward"}) m.impl(name, TORCH_BOX(&qcompile::linear_tiled));
  for (const char* name : {"linear_tiled_split", "linear_tiled_split_forward"})
    m.impl(name, TORCH_BOX(&qcompile::linear_tiled_split));
  m.impl("linear_tiled_static", TORCH_BOX(&qcompile::linear_tiled_static));
  for (const char* name : {"attention", "attention_forward"}) m.impl(name, TORCH_BOX(&qcompile::attention));
  m.impl("embedding_tiled", TORCH_BOX(&qcompile::embedding_tiled));
  m.impl("dequantize_tiled", TORCH_BOX(&qcompile::dequantize_tiled));
}

// For Python through ctypes: which instruction set runs, and choosing another. Null, or the reason why not.
extern "C" __attribute__((visibility("default"))) const char* qcompile_isa() {
  try {
    return qcompile::kernels().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) const char* qcompile_set_isa(const char* name) {
  thread_local std::string message;
  try {
    qcompile::set_isa(name);
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}
