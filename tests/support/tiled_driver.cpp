// Runs the CPU kernels without torch, on random data, against plain loops in double: for instruction sets that only an
// emulator has. Arguments: the instruction sets to run. Prints a line for each; exits with 1 where a result is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "half.h"
#include "attention_plan.h"
#include "kernels.h"

using namespace qcompile;

namespace {

uint64_t state = 88172645463325252ull;
uint32_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return uint32_t(state >> 16);
}
double uniform(double lo, double hi) { return lo + (hi - lo) * (random_bits() / 4294967296.0); }
double normal() {
  double sum = 0;
  for (int i = 0; i < 12; ++i) sum += uniform(-0.5, 0.5);
  return sum;
}
double input() { return normal() * (random_bits() % 97 == 0 ? 2 : 0.1); }  // with an outlier now and then

struct Floats {  // values in one of the float types, and what they are after rounding to it
  DType type;
  std::vector<char> bytes;
  std::vector<double> values;
  Floats(DType t, size_t n, double (*draw)()) : type(t), bytes(n * element_size(t) + 64), values(n) {
    for (size_t i = 0; i < n; ++i) {
      store_scalar(bytes.data(), t, int64_t(i), float(draw()));
      values[i] = load_scalar(bytes.data(), t, int64_t(i));
    }
  }
};

void serial(int64_t total, int64_t, Body body, void* context) {  // in three parts, as threads would take them
  for (int64_t i = 0; i < 3; ++i)
    if (total * i / 3 < total * (i + 1) / 3) body(total * i / 3, total * (i + 1) / 3, context);
}

// Where bit i of the codes of a chunk of 4 columns lies (layouts/tiled.py).
void place(int bits, int chunk, int i, int* cell, int* bit) {
  const int whole = 8 / bits * bits, spare = 8 - whole;
  *cell = chunk < whole ? chunk % bits : ((chunk - whole) * bits + i) / spare;
  *bit = chunk < whole ? chunk / bits * bits + i : whole + ((chunk - whole) * bits + i) % spare;
}

double float8_value(Code code, int byte) {
  const int exponent_bits = code == Code::kE5m2 ? 5 : 4, mantissa_bits = 7 - exponent_bits;
  const int bias = code == Code::kE4m3fn ? 7 : code == Code::kE4m3fnuz ? 8 : 15;
  const int e = (byte & 0x7f) >> mantissa_bits, m = byte & ((1 << mantissa_bits) - 1);
  const double fraction = double(m) / (1 << mantissa_bits);
  const double value = e == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, e - bias);
  return (byte & 0x80) != 0 ? -value : value;
}
// Whether a code is drawn: a number that is not so large that sums leave the range of float16.
bool usable(Code code, int byte) {
  if (code == Code::kInteger) return true;
  return byte != 0x80 && std::fabs(float8_value(code, byte)) <= 16;
}

struct Matrix {  // a packed weight and its values
  int64_t rows, cols;
  std::vector<uint8_t> codes, zeros;
  Floats scale, shift;
  std::vector<double> values;
  Weight w{};

  Matrix(int64_t n, int64_t k, int64_t group, int bits, Code code, Zero zero, DType type)
      : rows(n), cols(k),
        scale(type, size_t((n + 15) / 16 * 16 * ((k + group - 1) / group)), [] { return uniform(0.5, 1.5); }),
        shift(type, scale.values.size(), [] { return uniform(-2, 2); }), values(size_t(n * k)) {
    w.bits = bits;
    w.code = code;
    w.zero_kind = zero;
    w.scale_dtype = type;
    w.cols = k;
    w.group_size = group;
    w.groups = (k + group - 1) / group;
    w.tiles = (n + 15) / 16;
    w.blocks_per_group = (group + 31) / 32;
    w.blocks = (w.groups - 1) * w.blocks_per_group + (k - (w.groups - 1) * group + 31) / 32;
    codes.assign(size_t(w.tiles * w.blocks * 64 * bits) + 8192, 0);
    zeros.resize(scale.values.size());
    for (uint8_t& z : zeros) z = uint8_t((1 << (bits - 1)) - 1 + random_bits() % 3);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t column = 0; column < k; ++column) {
        int u = 0;
        do u = int(random_bits() & ((1u << bits) - 1));
        while (!usable(code, u));
        const int64_t g = column / group, at = (row / 16 * w.groups + g) * 16 + row % 16;
        const int64_t block = g * w.blocks_per_group + column % group / 32;
        const int chunk = int(column % group % 32 / 4);
        for (int i = 0; i < bits; ++i) {
          int cell, bit;
          place(bits, chunk, i, &cell, &bit);
          uint8_t& byte = codes[size_t(((row / 16 * w.blocks + block) * bits + cell) * 64 + row % 16 * 4 + column % group % 4)];
          byte = uint8_t(byte | (u >> i & 1) << bit);
        }
        const double s = scale.values[size_t(at)];
        double& value = values[size_t(row * k + column)];
        if (code != Code::kInteger) value = float8_value(code, u) * s;
        else if (zero == Zero::kShift) value = u * s + shift.values[size_t(at)];
        else value = (u - (zero == Zero::kCode ? zeros[size_t(at)] : 1 << (bits - 1))) * s;
      }
    w.codes = codes.data();
    w.scale = scale.bytes.data();
    w.zero = zero == Zero::kCode ? static_cast<const void*>(zeros.data())
             : zero == Zero::kShift ? static_cast<const void*>(shift.bytes.data()) : nullptr;
  }
};

// x rounded to int8 by blocks of 32 columns, as the kernels do it.
std::vector<double> rounded(const Weight& w, const std::vector<double>& x, int64_t m) {
  std::vector<double> r(x.size());
  for (int64_t row = 0; row < m; ++row)
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t c = g * w.group_size; c < std::min((g + 1) * w.group_size, w.cols); c += 32) {
        const int64_t end = std::min({c + 32, (g + 1) * w.group_size, w.cols});
        float most = 0;
        for (int64_t i = c; i < end; ++i) most = std::max(most, std::fabs(float(x[size_t(row * w.cols + i)])));
        for (int64_t i = c; i < end; ++i) {
          const size_t at = size_t(row * w.cols + i);
          r[at] = most == 0 ? 0 : double(most / 127.0f) * std::nearbyint(float(x[at]) * (127.0f / most));
        }
      }
  return r;
}

double activate(Activation a, double v) {
  switch (a) {
    case Activation::kNone: return v;
    case Activation::kRelu: return v > 0 ? v : 0;
    case Activation::kGelu: return v * 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
    case Activation::kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::kSilu: return v / (1 + std::exp(-v));
    case Activation::kSigmoid: return 1 / (1 + std::exp(-v));
    case Activation::kTanh: return std::tanh(v);
  }
  return v;
}

const char* isa = "";
int cases = 0, wrong = 0;
void check(const char* what, double error, double size, double bound) {
  ++cases;
  if (error <= bound * size) return;
  std::printf("%s: %s: error %g of %g, allowed is %g\n", isa, what, error, size, bound * size);
  ++wrong;
}

double rounding(DType t) { return t == DType::kFloat32 ? 1e-5 : t == DType::kFloat16 ? 1e-3 : 5e-3; }

void linear_case(int bits, Code code, Zero zero, bool exact, int64_t m, int64_t n, int64_t k, int64_t group, int which) {
  const DType types[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const Matrix matrix(n, k, group, bits, code, zero, types[which % 3]);
  const DType type = types[which / 3 % 3];
  const Floats x(type, size_t(m * k), input), bias(DType::kFloat32, size_t(n), normal);
  const Floats mul(type, size_t(m * n), normal), add(type, size_t(m * n), normal);
  std::vector<char> out(size_t(m * n) * element_size(type) + 64);
  const Part part = {0, n, out.data(), bias.bytes.data(), nullptr};
  Linear a{};
  a.w = matrix.w;
  a.x = x.bytes.data();
  a.dtype = type;
  a.bias_dtype = DType::kFloat32;
  a.m = m;
  a.parts = &part;
  a.part_count = 1;
  a.units = matrix.w.tiles;
  a.exact = exact || code != Code::kInteger;
  a.activation = Activation(which % 7);
  if (which % 2 == 1) a.mul = mul.bytes.data();
  if (which % 5 == 1) a.add = add.bytes.data();
  a.threads = 2;
  a.parallel = serial;
  const size_t bytes = ScratchPlan(a.w, m, a.exact).bytes;
  char* scratch = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
  a.scratch = scratch;
  kernels().linear(a);
  std::free(scratch);
  const std::vector<double> seen = a.exact ? x.values : rounded(a.w, x.values, m);
  double error = 0, size = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, most = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double product = seen[size_t(i * k + c)] * matrix.values[size_t(j * k + c)];
        sum += product;
        most += product * product;
      }
      const size_t at = size_t(i * n + j);
      double y = activate(a.activation, sum + bias.values[size_t(j)]);
      double scale = 1;
      if (a.mul != nullptr) y *= mul.values[at], scale = std::fabs(mul.values[at]);
      if (a.add != nullptr) y += add.values[at];
      const double off = load_scalar(out.data(), type, int64_t(at)) - y;
      error += off * off;
      size += (most * scale * scale) + y * y + 1e-6;
    }
  char what[160];
  std::snprintf(what, sizeof what, "linear bits=%d code=%d zero=%d exact=%d m=%d n=%d k=%d group=%d which=%d", bits, int(code),
                int(zero), int(exact), int(m), int(n), int(k), int(group), which);
  check(what, std::sqrt(error), std::sqrt(size), rounding(type) + (zero == Zero::kShift ? 1e-5 : 0));
}

void decode_case(int bits, Code code, Zero zero, DType type) {
  const int64_t n = 35, k = 97;
  const Matrix matrix(n, k, 48, bits, code, zero, type);
  const int64_t indices[] = {34, 0, 17, 17, 3};
  std::vector<char> out(size_t(5 * k) * element_size(type) + 64);
  Decode d{};
  d.w = matrix.w;
  d.indices = indices;
  d.wide_indices = true;
  d.count = 5;
  d.dtype = type;
  d.out = out.data();
  d.parallel = serial;
  kernels().decode(d);
  double error = 0, size = 0;
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t c = 0; c < k; ++c) {
      const double want = matrix.values[size_t(indices[i] * k + c)];
      const double off = load_scalar(out.data(), type, i * k + c) - want;
      error += off * off, size += want * want;
    }
  check("decode", std::sqrt(error), std::sqrt(size), rounding(type));
}

// What the portable unit gives, which Python compares with plain torch, to the bit.
void encode_case(int bits, Zero kind, DType type, DType scale_type, int64_t rows, int64_t cols, int64_t group) {
  const Floats x(type, size_t(rows * cols), input);
  Encode e{};
  e.x = x.bytes.data(), e.dtype = type, e.rows = rows, e.cols = cols, e.group_size = group;
  e.groups = (cols + group - 1) / group, e.row_bytes = (cols * bits + 7) / 8;
  e.bits = bits, e.kind = kind, e.scale_dtype = scale_type;
  e.parts = 2, e.part_scratch = (group + 31) / 16 * 16;
  e.scratch = static_cast<float*>(std::aligned_alloc(64, size_t(e.parts * e.part_scratch) * 4));
  e.parallel = serial;
  std::vector<uint8_t> made[2][3];
  std::vector<double> squares[2];
  for (int i = 0; i < 2; ++i) {
    made[i][0].resize(size_t(rows * e.row_bytes)), squares[i].resize(size_t(rows) * 2);
    made[i][1].resize(size_t(rows * e.groups) * 4), made[i][2].resize(size_t(rows * e.groups) * 4);
    e.data = made[i][0].data(), e.scale = made[i][1].data(), e.zero = made[i][2].data(), e.squares = squares[i].data();
    (i == 0 ? kPortable : kernels()).encode(e);
  }
  std::free(e.scratch);
  bool same = squares[0] == squares[1];
  for (int i = 0; i < 3; ++i) same &= made[0][i] == made[1][i];
  check("encode", same ? 0.0 : 1.0, 1.0, 0.5);
}

void attention_case(DType type, int64_t dim, int64_t queries, bool masked) {
  const int64_t heads = 6, kv_heads = 2, keys = 133, bytes = int64_t(element_size(type));
  const Floats q(type, size_t(heads * queries * dim), normal), k(type, size_t(kv_heads * keys * dim), normal);
  const Floats v(type, size_t(kv_heads * keys * dim), normal);
  std::vector<char> mask(size_t(queries * keys)), out(size_t(heads * queries * dim * bytes) + 64);
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t j = 0; j < keys; ++j) mask[size_t(i * keys + j)] = char(j < 70 + i && j % 11 != 3);
  Attention a{};
  a.q = q.bytes.data(), a.k = k.bytes.data(), a.v = v.bytes.data(), a.out = out.data();
  a.q_stride[0] = heads * queries * dim * bytes, a.q_stride[1] = queries * dim * bytes, a.q_stride[2] = dim * bytes;
  a.k_stride[0] = kv_heads * keys * dim * bytes, a.k_stride[1] = keys * dim * bytes, a.k_stride[2] = dim * bytes;
  std::copy(a.k_stride, a.k_stride + 3, a.v_stride);
  std::copy(a.q_stride, a.q_stride + 3, a.out_stride);
  if (masked) a.mask = mask.data(), a.mask_is_bool = true, a.mask_stride[2] = keys, a.mask_stride[3] = 1;
  a.dtype = a.mask_dtype = type;
  a.batch = 1, a.heads = heads, a.kv_heads = kv_heads, a.queries = queries, a.keys = keys, a.dim = a.value_dim = dim;
  a.scale = float(1 / std::sqrt(double(dim)));
  a.threads = 3;
  a.parallel = serial;
  const size_t need = AttentionPlan(a).bytes;
  a.scratch = static_cast<char*>(std::aligned_alloc(64, (need + 63) / 64 * 64 + 64));
  kernels().attention(a);
  std::free(a.scratch);
  double error = 0, size = 0;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t from = h / (heads / kv_heads) * keys;
      std::vector<double> score(keys, -1e30);
      double most = -1e30, total = 0;
      for (int64_t j = 0; j < keys; ++j) {
        if (masked && mask[size_t(i * keys + j)] == 0) continue;
        double sum = 0;
        for (int64_t c = 0; c < dim; ++c) sum += q.values[size_t((h * queries + i) * dim + c)] * k.values[size_t((from + j) * dim + c)];
        score[size_t(j)] = sum * a.scale;
        most = std::max(most, score[size_t(j)]);
      }
      for (double& s : score) total += s = std::exp(s - most);
      for (int64_t c = 0; c < dim; ++c) {
        double want = 0;
        for (int64_t j = 0; j < keys; ++j) want += score[size_t(j)] / total * v.values[size_t((from + j) * dim + c)];
        const double off = load_scalar(out.data(), type, (h * queries + i) * dim + c) - want;
        error += off * off, size += want * want;
      }
    }
  check("attention", std::sqrt(error), std::sqrt(size), rounding(type));
}

void run_all() {
  const int64_t shapes[][3] = {{33, 97, 32}, {16, 160, 160}, {40, 193, 48}, {7, 1, 1}, {20, 1300, 64}};
  const Code float8[] = {Code::kE4m3fn, Code::kE4m3fnuz, Code::kE5m2};
  int which = 0;
  for (const auto& s : shapes)
    for (int64_t m : {1, 2, 3, 5, 8, 19}) {
      for (int bits : {2, 3, 4, 5, 6, 8})
        for (Zero zero : {Zero::kMiddle, Zero::kCode, Zero::kShift})
          for (bool exact : {false, true}) linear_case(bits, Code::kInteger, zero, exact, m, s[0], s[1], s[2], which++);
      for (Code code : float8) linear_case(8, code, Zero::kMiddle, true, m, s[0], s[1], s[2], which++);
    }
  for (DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (Zero zero : {Zero::kMiddle, Zero::kCode, Zero::kShift}) {
        decode_case(bits, Code::kInteger, zero, type);
        for (DType scale_type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
          encode_case(bits, zero, type, scale_type, 3, 97, 32), encode_case(bits, zero, type, scale_type, 2, 161, 5);
      }
    for (Code code : float8) decode_case(8, code, Zero::kMiddle, type);
    for (int64_t dim : {64, 80, 7})
      for (bool masked : {false, true}) attention_case(type, dim, 2, masked), attention_case(type, dim, 1, masked);
  }
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    isa = names[i];
    set_isa(isa);
    cases = 0;
    run_all();
    std::printf("%s: %d cases\n", isa, cases);
  }
  return wrong == 0 ? 0 : 1;
}
