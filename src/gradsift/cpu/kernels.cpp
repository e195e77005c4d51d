// What a transformer's step does between its matrix products, in one pass over memory each.
//
// Every function exists for float32 and bfloat16 activations; all arithmetic is float32. Vectors are
// the compiler's own (GCC and Clang), so any processor will do. Threads are torch's.
//
// Shape letters: M tokens of a batch, D width, P predicted places, V vocabulary, B examples, H heads,
// T tokens of an example, E width of a head.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using bits16 = c10::BFloat16;

constexpr int64_t LANES = 16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

inline vec all(float x) { return vec{} + x; }

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vec load(const bits16* p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, words) << 16);
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// To the nearest, ties to even; what is not a number stays so.
inline void store(bits16* p, vec v) {
  words w = (words)v;
  words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  ints is_number = (v == v);
  rounded = (rounded & (words)is_number) | (0x7fc0u & ~(words)is_number);
  halves h = __builtin_convertvector(rounded, halves);
  std::memcpy(p, &h, sizeof h);
}

// The last, shorter piece of a row.
template <typename S>
inline vec load_some(const S* p, int64_t n, float rest) {
  float lanes[LANES];
  for (int64_t i = 0; i < LANES; ++i) lanes[i] = i < n ? static_cast<float>(p[i]) : rest;
  return load(lanes);
}

template <typename S>
inline void store_some(S* p, int64_t n, vec v) {
  S lanes[LANES];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

inline vec choose(ints condition, vec yes, vec no) { return (vec)(((ints)yes & condition) | ((ints)no & ~condition)); }

// Lane j of the result is number `from[j]` of the lanes of a and then b.
inline vec shuffle(vec a, vec b, ints from) {
#ifdef __clang__
  vec found;
  for (int j = 0; j < LANES; ++j) found[j] = (from[j] & LANES ? b : a)[from[j] & (LANES - 1)];
  return found;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Lanes j and j + s of each pair fold into one, for s = 8, 4, 2, 1.
template <typename F>
inline float fold(vec v, F combine) {
  v = combine(v, shuffle(v, v, ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = combine(v, shuffle(v, v, ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = combine(v, shuffle(v, v, ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = combine(v, shuffle(v, v, ints{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
}

inline vec larger(vec a, vec b) { return choose((b > a) | (b != b), b, a); }  // NaN wins

inline float sum(vec v) {
  return fold(v, [](vec a, vec b) { return a + b; });
}

inline float largest(vec v) { return fold(v, larger); }

// e^x to an ulp or two; infinity above 88.3, 0 below -87.3; NaN stays NaN.
inline vec exponential(vec x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  vec n = x * 1.44269504088896341f + shift;
  words power = ((words)n << 23) + (words)all(1.0f);  // 2^n, as the lower bits of a float so large are n's own
  n = n - shift;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y = choose(x > 88.3f, all(std::numeric_limits<float>::infinity()), y * (vec)power);
  return choose(x < -87.3f, all(0.0f), y);
}

// What the loops below take for granted, of every tensor that comes from outside.
void check(const char* name, const Tensor& x, at::IntArrayRef sizes, at::ScalarType precision) {
  bool plain = x.is_cpu() && x.layout() == at::kStrided && x.is_contiguous();
  TORCH_CHECK(plain && x.sizes() == sizes && x.scalar_type() == precision, name, " must be ", precision, " of shape ",
              sizes, ", contiguous on a CPU, not ", x.scalar_type(), " of shape ", x.sizes());
}

at::ScalarType precision_of(const char* name, const Tensor& x) {
  at::ScalarType found = x.scalar_type();
  TORCH_CHECK(found == at::kFloat || found == at::kBFloat16, name, " must be float32 or bfloat16, not ", found);
  return found;
}

void check_width(int64_t width) {
  TORCH_CHECK(width > 0 && width % LANES == 0, "widths must be multiples of ", LANES, ", not ", width);
}

template <typename F>
void each_row(int64_t rows, int64_t width, F work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) work(row);
  });
}

// ------------------------------------------------------------------------------ normalisation

template <typename S>
void norm_rows(const float* x, const float* weight, const float* bias, S* y, float* means, float* scales, int64_t rows,
               int64_t width, float eps) {
  each_row(rows, width, [&](int64_t row) {
    const float* in = x + row * width;
    vec total{}, squares{};
    float mean = 0;
    if (bias != nullptr) {
      for (int64_t i = 0; i < width; i += LANES) total += load(in + i);
      mean = sum(total) / width;
    }
    for (int64_t i = 0; i < width; i += LANES) {
      vec d = load(in + i) - mean;
      squares += d * d;
    }
    float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
      vec v = (load(in + i) - mean) * scale * load(weight + i);
      store(y + row * width + i, bias == nullptr ? v : v + load(bias + i));
    }
    means[row] = mean;
    scales[row] = scale;
  });
}

// LayerNorm (with a bias) or RMSNorm (without) of a float32 stream, given in `precision`; means and 1 / deviations.
std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                        double eps, at::ScalarType precision) {
  int64_t width = x.size(-1);
  check_width(width);
  check("x", x, x.sizes(), at::kFloat);
  check("weight", weight, {width}, at::kFloat);
  if (bias) check("bias", *bias, {width}, at::kFloat);
  int64_t rows = x.numel() / width;
  Tensor y = at::empty(x.sizes(), x.options().dtype(precision));
  Tensor means = at::empty({rows}, x.options()), scales = at::empty({rows}, x.options());
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  precision_of("y", y);
  auto run = [&](auto* out) {
    norm_rows(x.const_data_ptr<float>(), weight.const_data_ptr<float>(), b, out, means.data_ptr<float>(),
              scales.data_ptr<float>(), rows, width, static_cast<float>(eps));
  };
  precision == at::kBFloat16 ? run(y.data_ptr<bits16>()) : run(y.data_ptr<float>());
  return {y, means, scales};
}

template <typename S>
void norm_rows_backward(const S* backprops, const float* x, const float* weight, const float* means,
                        const float* scales, bool centred, float* to_x, int64_t rows, int64_t width) {
  each_row(rows, width, [&](int64_t row) {
    const S* g = backprops + row * width;
    const float* in = x + row * width;
    float mean = means[row], scale = scales[row];
    vec sums{}, products{};
    for (int64_t i = 0; i < width; i += LANES) {
      vec d = load(g + i) * load(weight + i);
      sums += d;
      products += d * ((load(in + i) - mean) * scale);
    }
    float average = centred ? sum(sums) / width : 0.0f, along = sum(products) / width;
    for (int64_t i = 0; i < width; i += LANES) {
      vec normed = (load(in + i) - mean) * scale;
      store(to_x + row * width + i, (load(g + i) * load(weight + i) - average - normed * along) * scale);
    }
  });
}

Tensor norm_backward(const Tensor& backprops, const Tensor& x, const Tensor& weight, const Tensor& means,
                     const Tensor& scales, bool centred) {
  int64_t width = x.size(-1);
  check_width(width);
  int64_t rows = x.numel() / width;
  check("x", x, x.sizes(), at::kFloat);
  check("weight", weight, {width}, at::kFloat);
  check("means", means, {rows}, at::kFloat);
  check("scales", scales, {rows}, at::kFloat);
  check("backprops", backprops, x.sizes(), precision_of("backprops", backprops));
  Tensor to_x = at::empty(x.sizes(), x.options());
  auto run = [&](const auto* g) {
    norm_rows_backward(g, x.const_data_ptr<float>(), weight.const_data_ptr<float>(), means.const_data_ptr<float>(),
                       scales.const_data_ptr<float>(), centred, to_x.data_ptr<float>(), rows, width);
  };
  if (backprops.scalar_type() == at::kBFloat16)
    run(backprops.const_data_ptr<bits16>());
  else
    run(backprops.const_data_ptr<float>());
  return to_x;
}

// --------------------------------------------------------------------------------- activation

// GELU by tanh, x * s(x) with s = sigmoid(2 c (x + a x^3)), and its slope s + x s (1 - s) 2 c (1 + 3 a x^2).
template <typename S>
void gelu_piece(const S* x, S* y, S* slope, int64_t from, int64_t to) {
  constexpr float twice_c = 1.5957691216057308f, a = 0.044715f;
  for (int64_t i = from; i < to; i += LANES) {
    vec v = load(x + i);
    vec square = v * v;
    vec s = 1.0f / (1.0f + exponential(-twice_c * v * (1.0f + a * square)));
    vec y_ = v * s;
    store(y + i, y_);
    store(slope + i, s + y_ * (1.0f - s) * (twice_c + 3 * a * twice_c * square));
  }
}

template <typename S>
void gelu_all(const S* x, S* y, S* slope, int64_t count) {
  at::parallel_for(0, count / LANES, 2048,
                   [&](int64_t from, int64_t to) { gelu_piece(x, y, slope, from * LANES, to * LANES); });
}

std::tuple<Tensor, Tensor> gelu(const Tensor& x) {
  check("x", x, x.sizes(), precision_of("x", x));
  check_width(x.size(-1));
  Tensor y = at::empty(x.sizes(), x.options()), slope = at::empty(x.sizes(), x.options());
  if (x.scalar_type() == at::kBFloat16)
    gelu_all(x.const_data_ptr<bits16>(), y.data_ptr<bits16>(), slope.data_ptr<bits16>(), x.numel());
  else
    gelu_all(x.const_data_ptr<float>(), y.data_ptr<float>(), slope.data_ptr<float>(), x.numel());
  return {y, slope};
}

// silu(a) * b of rows (a, b), silu(a) = a s(a) with s = sigmoid; given its gradient, that of a and b.
template <typename S>
void gated_row(const S* both, int64_t width, S* y) {
  for (int64_t i = 0; i < width; i += LANES) {
    vec a = load(both + i);
    store(y + i, a / (1.0f + exponential(-a)) * load(both + width + i));
  }
}

template <typename S>
void gated_row_backward(const S* backprops, const S* both, int64_t width, S* to_both) {
  for (int64_t i = 0; i < width; i += LANES) {
    vec a = load(both + i), g = load(backprops + i), s = 1.0f / (1.0f + exponential(-a));
    store(to_both + i, g * load(both + width + i) * s * (1.0f + a * (1.0f - s)));
    store(to_both + width + i, g * a * s);
  }
}

Tensor gated(const Tensor& both) {
  TORCH_CHECK(both.dim() == 2 && both.size(1) % 2 == 0, "gate and up must be (M, 2 F), not ", both.sizes());
  check("gate and up", both, both.sizes(), precision_of("gate and up", both));
  check_width(both.size(1) / 2);
  int64_t rows = both.size(0), width = both.size(1) / 2;
  Tensor y = at::empty({rows, width}, both.options());
  auto run = [&](const auto* in, auto* out) {
    each_row(rows, width, [&](int64_t row) { gated_row(in + row * 2 * width, width, out + row * width); });
  };
  if (both.scalar_type() == at::kBFloat16)
    run(both.const_data_ptr<bits16>(), y.data_ptr<bits16>());
  else
    run(both.const_data_ptr<float>(), y.data_ptr<float>());
  return y;
}

Tensor gated_backward(const Tensor& backprops, const Tensor& both) {
  TORCH_CHECK(both.dim() == 2 && both.size(1) % 2 == 0, "gate and up must be (M, 2 F), not ", both.sizes());
  int64_t rows = both.size(0), width = both.size(1) / 2;
  check_width(width);
  check("gate and up", both, both.sizes(), precision_of("gate and up", both));
  check("backprops", backprops, {rows, width}, both.scalar_type());
  Tensor to_both = at::empty(both.sizes(), both.options());
  auto run = [&](const auto* g, const auto* in, auto* out) {
    each_row(rows, width, [&](int64_t row) {
      gated_row_backward(g + row * width, in + row * 2 * width, width, out + row * 2 * width);
    });
  };
  if (both.scalar_type() == at::kBFloat16)
    run(backprops.const_data_ptr<bits16>(), both.const_data_ptr<bits16>(), to_both.data_ptr<bits16>());
  else
    run(backprops.const_data_ptr<float>(), both.const_data_ptr<float>(), to_both.data_ptr<float>());
  return to_both;
}

// ----------------------------------------------------------------------------------- products

constexpr int64_t BLOCK = 32;  // rows: the library compiles a product anew for every number of them

// x (M, I) times a packed weight, by oneDNN.
Tensor packed_product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                           c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, packed, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// Every thread multiplies rows of its own, and finishes them with `finish(first row, rows, product)` while they
// are in its cache.
template <typename F>
void products(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias, int64_t width, F finish) {
  TORCH_CHECK(packed.is_mkldnn() && packed.scalar_type() == at::kBFloat16, "the weight is not packed in bfloat16");
  TORCH_CHECK(given.dim() == 2 && packed.sizes() == at::IntArrayRef({width, given.size(1)}), "x ", given.sizes(),
              " times a packed weight ", packed.sizes(), " is not (M, ", width, ")");
  const Tensor x = given.contiguous();
  check("x", x, x.sizes(), at::kBFloat16);
  if (bias) check("bias", *bias, {width}, at::kBFloat16);
  int64_t rows = x.size(0), blocks = (rows + BLOCK - 1) / BLOCK;
  int64_t pieces = std::min<int64_t>(at::get_num_threads(), blocks);
  at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t piece = from; piece < to; ++piece) {
      int64_t first = blocks * piece / pieces * BLOCK, end = blocks * (piece + 1) / pieces * BLOCK;
      Tensor part = x.narrow(0, first, std::min(end, rows) - first);
      if (end > rows) {
        Tensor whole = at::zeros({end - first, x.size(1)}, x.options());
        whole.narrow(0, 0, rows - first).copy_(part);
        part = whole;
      }
      finish(first, std::min(end, rows) - first, packed_product(part, packed, bias));
    }
  });
}

Tensor product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t width) {
  TORCH_CHECK(width > 0, "a product's width must be positive, not ", width);
  Tensor y = at::empty({x.size(0), width}, x.options());
  char* out = static_cast<char*>(y.data_ptr());
  int64_t bytes = width * y.element_size();
  products(x, packed, bias, width, [&](int64_t first, int64_t rows, const Tensor& part) {
    std::memcpy(out + first * bytes, part.const_data_ptr(), rows * bytes);
  });
  return y;
}

// x times the packed weight, element by element times `factor`.
Tensor product_times(const Tensor& x, const Tensor& packed, const Tensor& factor) {
  check_width(factor.size(-1));
  check("factor", factor, {x.size(0), factor.size(-1)}, at::kBFloat16);
  Tensor y = at::empty(factor.sizes(), x.options());
  const bits16* f = factor.const_data_ptr<bits16>();
  bits16* out = y.data_ptr<bits16>();
  int64_t width = factor.size(1);
  products(x, packed, std::nullopt, width, [&](int64_t first, int64_t rows, const Tensor& part) {
    const bits16* in = part.const_data_ptr<bits16>();
    int64_t start = first * width;
    for (int64_t i = 0; i < rows * width; i += LANES) store(out + start + i, load(in + i) * load(f + start + i));
  });
  return y;
}

std::tuple<Tensor, Tensor> product_gelu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                                        int64_t width) {
  check_width(width);
  Tensor y = at::empty({x.size(0), width}, x.options()), slope = at::empty({x.size(0), width}, x.options());
  bits16 *out = y.data_ptr<bits16>(), *slopes = slope.data_ptr<bits16>();
  products(x, packed, bias, width, [&](int64_t first, int64_t rows, const Tensor& part) {
    gelu_piece(part.const_data_ptr<bits16>(), out + first * width, slopes + first * width, 0, rows * width);
  });
  return {y, slope};
}

// ------------------------------------------------------------------------------- cross entropy

template <typename S>
float cross_entropy_row(S* logits, int64_t target, float chosen, int64_t width, int64_t padded, bool wants_gradient) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  int64_t whole = width / LANES * LANES, rest = width - whole;
  logits[target] = static_cast<S>(lowest);  // its exact value counts instead
  vec top = all(lowest);
  for (int64_t i = 0; i < whole; i += LANES) top = larger(top, load(logits + i));
  if (rest) top = larger(top, load_some(logits + whole, rest, lowest));
  float most = std::max(largest(top), chosen);
  if (std::isnan(largest(top)) || std::isnan(chosen)) most = std::numeric_limits<float>::quiet_NaN();
  vec total{};
  for (int64_t i = 0; i < whole; i += LANES) total += exponential(load(logits + i) - most);
  if (rest) total += exponential(load_some(logits + whole, rest, lowest) - most);
  float own = std::exp(chosen - most), all_of_it = sum(total) + own;
  if (wants_gradient) {
    float factor = 1.0f / all_of_it;
    for (int64_t i = 0; i < whole; i += LANES) store(logits + i, exponential(load(logits + i) - most) * factor);
    if (rest) {
      vec last = load_some(logits + whole, rest, lowest);
      store_some(logits + whole, rest, exponential(last - most) * factor);
    }
    logits[target] = static_cast<S>(own * factor - 1.0f);
    for (int64_t i = width; i < padded; ++i) logits[i] = static_cast<S>(0.0f);
  }
  return most + std::log(all_of_it) - chosen;
}

// Losses (P,) of logits (P, padded V), which become softmax minus one-hot where the gradient is wanted.
Tensor cross_entropy_(Tensor& logits, const Tensor& targets, const Tensor& chosen, int64_t vocabulary,
                      bool wants_gradient) {
  TORCH_CHECK(logits.dim() == 2, "logits must be (P, padded V), not ", logits.sizes());
  int64_t rows = logits.size(0), padded = logits.size(1);
  check("logits", logits, logits.sizes(), precision_of("logits", logits));
  check("targets", targets, {rows}, at::kLong);
  check("chosen", chosen, {rows}, at::kFloat);
  TORCH_CHECK(0 < vocabulary && vocabulary <= padded, "a vocabulary of ", vocabulary, " in logits ", logits.sizes());
  Tensor losses = at::empty({rows}, chosen.options());
  const int64_t* t = targets.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK_INDEX(0 <= t[row] && t[row] < vocabulary, "target ", t[row], " is not in a vocabulary of ", vocabulary);
  const float* c = chosen.const_data_ptr<float>();
  float* out = losses.data_ptr<float>();
  auto run = [&](auto* data) {
    each_row(rows, padded, [&](int64_t row) {
      out[row] = cross_entropy_row(data + row * padded, t[row], c[row], vocabulary, padded, wants_gradient);
    });
  };
  logits.scalar_type() == at::kBFloat16 ? run(logits.data_ptr<bits16>()) : run(logits.data_ptr<float>());
  return losses;
}

// ----------------------------------------------------------------------------------- attention

// C (m, n) (+)= A (m, k) B (k, n); A by any strides, B and C row by row with n a multiple of LANES.
template <int ROWS, int PIECES>
inline void tile(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool accumulate) {
  vec sums[ROWS][PIECES];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PIECES; ++p) sums[r][p] = accumulate ? load(c + r * ldc + p * LANES) : vec{};
  for (int64_t i = 0; i < k; ++i) {
    vec pieces[PIECES];
    for (int p = 0; p < PIECES; ++p) pieces[p] = load(b + i * ldb + p * LANES);
    for (int r = 0; r < ROWS; ++r) {
      float factor = a[r * a_row + i * a_col];
      for (int p = 0; p < PIECES; ++p) sums[r][p] += factor * pieces[p];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PIECES; ++p) store(c + r * ldc + p * LANES, sums[r][p]);
}

template <int PIECES>
inline void columns(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                    float* c, int64_t ldc, bool accumulate) {
  int64_t row = 0;
  for (; row + 6 <= m; row += 6)
    tile<6, PIECES>(k, a + row * a_row, a_row, a_col, b, ldb, c + row * ldc, ldc, accumulate);
  for (; row < m; ++row) tile<1, PIECES>(k, a + row * a_row, a_row, a_col, b, ldb, c + row * ldc, ldc, accumulate);
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t column = 0; column < n;) {
    int64_t pieces = std::min<int64_t>(4, (n - column) / LANES);
    auto run = [&](auto some) { columns<some()>(m, k, a, a_row, a_col, b + column, ldb, c + column, ldc, accumulate); };
    if (pieces == 4) run(std::integral_constant<int, 4>{});
    else if (pieces == 3) run(std::integral_constant<int, 3>{});
    else if (pieces == 2) run(std::integral_constant<int, 2>{});
    else run(std::integral_constant<int, 1>{});
    column += pieces * LANES;
  }
}

constexpr int64_t QUERIES = 48;  // that are worked on together

template <typename S>
struct Heads {  // (B, T, H, E) by any strides but that of E, which is 1
  S* data;
  int64_t example, token, head;
  S* at(int64_t b, int64_t h) const { return data + b * example + h * head; }
};

template <typename S>
Heads<S> heads(const Tensor& t) {  // (B, H, T, E)
  return {reinterpret_cast<S*>(t.data_ptr()), t.stride(0), t.stride(2), t.stride(1)};
}

struct Scratch {
  std::vector<float> floats;
  size_t used = 0;
  explicit Scratch(size_t count) : floats(count) {}
  float* take(int64_t count) {
    float* p = floats.data() + used;
    used += count;
    return p;
  }
};

template <typename S>
void widen(const S* from, int64_t stride, int64_t rows, int64_t width, float* to) {  // width is a multiple of LANES
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += LANES) store(to + r * width + i, load(from + r * stride + i));
}

template <typename S>
void narrow(const float* from, int64_t rows, int64_t width, S* to, int64_t stride) {  // the way back
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += LANES) store(to + r * stride + i, load(from + r * width + i));
}

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// (rows, width) to (width, ld), ld the rows rounded up to LANES; width is a multiple of LANES.
void transpose(const float* from, int64_t rows, int64_t width, float* to, int64_t ld) {
  const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < width; column += LANES) {
      vec square[LANES];
      for (int64_t r = 0; r < LANES; ++r) square[r] = row + r < rows ? load(from + (row + r) * width + column) : vec{};
      for (int step = LANES / 2; step > 0; step /= 2) {  // swap the off-diagonal quarters of ever smaller squares
        ints upper = (lanes & step) != 0;
        ints first = (lanes & ~upper) | ((lanes - step + int(LANES)) & upper);
        ints second = ((lanes + step) & ~upper) | ((lanes + int(LANES)) & upper);
        for (int r = 0; r < LANES; ++r)
          if (!(r & step)) {
            vec a = square[r], b = square[r + step];
            square[r] = shuffle(a, b, first);
            square[r + step] = shuffle(a, b, second);
          }
      }
      for (int64_t r = 0; r < LANES; ++r) store(to + (column + r) * ld + row, square[r]);
    }
}

// Turns the halves (a, b) of each row by its token's angles: (a cos - b sin, b cos + a sin), and gradients back. The
// cosines and sines are (T, E).
struct Angles {
  const float *cos = nullptr, *sin = nullptr;
  int64_t width = 0;

  template <bool BACK>
  void turn(float* rows, int64_t count, int64_t first) const {
    if (cos == nullptr) return;
    int64_t half = width / 2;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < half; i += LANES) {
        float* row = rows + r * width + i;
        const float *c = cos + (first + r) * width + i, *s = sin + (first + r) * width + i;
        vec a = load(row), b = load(row + half);
        store(row, BACK ? a * load(c) + b * load(s + half) : a * load(c) - b * load(s));
        store(row + half, BACK ? b * load(c + half) - a * load(s) : b * load(c + half) + a * load(s + half));
      }
  }
  void forth(float* rows, int64_t count, int64_t first) const { turn<false>(rows, count, first); }
  void back(float* rows, int64_t count, int64_t first) const { turn<true>(rows, count, first); }
};

Angles angles(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  if (!cos) return {};
  return {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), cos->size(1)};
}

// Turn scores (rows, seen) of queries first, first + 1, ... into probabilities; keys after a query count nothing.
void causal_softmax(float* scores, int64_t rows, int64_t first, int64_t seen, int64_t ld, float scale, float* lse) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    int64_t known = first + r + 1;
    for (int64_t i = known; i < padded(seen); ++i) row[i] = -std::numeric_limits<float>::infinity();
    vec top = all(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < padded(known); i += LANES) top = larger(top, load(row + i));
    float most = largest(top) * scale;
    vec total{};
    for (int64_t i = 0; i < padded(seen); i += LANES) {
      vec e = exponential(load(row + i) * scale - most);
      store(row + i, e);
      total += e;
    }
    float whole = sum(total), factor = 1.0f / whole;
    for (int64_t i = 0; i < padded(known); i += LANES) store(row + i, load(row + i) * factor);
    lse[r] = most + std::log(whole);
  }
}

template <typename S>
void attend_all(const Tensor& q, const Tensor& k, const Tensor& v, float scale, const Angles& turned, Tensor& out,
                Tensor& lse) {
  int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3), group = H / k.size(1), TP = padded(T);
  auto qs = heads<S>(q), ks = heads<S>(k), vs = heads<S>(v);
  S* o = reinterpret_cast<S*>(out.data_ptr());
  float* l = lse.data_ptr<float>();
  at::parallel_for(0, B * H, 1, [&](int64_t from, int64_t to) {
    Scratch scratch(2 * T * E + E * TP + QUERIES * (TP + 2 * E));
    float *keys = scratch.take(T * E), *values = scratch.take(T * E), *keys_t = scratch.take(E * TP);
    float* scores = scratch.take(QUERIES * TP);
    float *queries = scratch.take(QUERIES * E), *result = scratch.take(QUERIES * E);
    for (int64_t index = from; index < to; ++index) {
      int64_t b = index / H, h = index % H;
      widen(ks.at(b, h / group), ks.token, T, E, keys);
      turned.forth(keys, T, 0);
      widen(vs.at(b, h / group), vs.token, T, E, values);
      transpose(keys, T, E, keys_t, TP);
      for (int64_t first = 0; first < T; first += QUERIES) {
        int64_t rows = std::min(QUERIES, T - first), seen = first + rows;
        widen(qs.at(b, h) + first * qs.token, qs.token, rows, E, queries);
        turned.forth(queries, rows, first);
        multiply(rows, padded(seen), E, queries, E, 1, keys_t, TP, scores, TP, false);
        causal_softmax(scores, rows, first, seen, TP, scale, l + index * T + first);
        multiply(rows, E, seen, scores, TP, 1, values, E, result, E, false);
        narrow(result, rows, E, o + ((b * T + first) * H + h) * E, H * E);
      }
    }
  });
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (B, H, T, E), not ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK(k.sizes() == at::IntArrayRef({q.size(0), k.size(1), q.size(2), q.size(3)}) && v.sizes() == k.sizes() &&
                  k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit each other");
  check_width(q.size(3));
  for (const Tensor& x : {q, k, v}) {
    bool plain = x.is_cpu() && x.layout() == at::kStrided && x.stride(3) == 1;
    TORCH_CHECK(plain && x.scalar_type() == precision_of("q", q), "q, k and v must be on a CPU, of one precision, and ",
                "head by head contiguous");
  }
}

// Both or neither of the cosines and sines of the rotary angles of q's tokens.
void check_angles(const Tensor& q, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  if (!cos) return;
  check("cos", *cos, {q.size(2), q.size(3)}, at::kFloat);
  check("sin", *sin, {q.size(2), q.size(3)}, at::kFloat);
  check_width(q.size(3) / 2);
}

// Causal attention of examples padded on the right, queries and keys turned by rotary angles (T, E) where they
// are given: (B, T, H, E), and the logarithms of the softmax's sums, (B, H, T).
std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                  const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  check_heads(q, k, v);
  check_angles(q, cos, sin);
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (q.scalar_type() == at::kBFloat16)
    attend_all<bits16>(q, k, v, static_cast<float>(scale), angles(cos, sin), out, lse);
  else
    attend_all<float>(q, k, v, static_cast<float>(scale), angles(cos, sin), out, lse);
  return {out, lse};
}

// Of a query that knows `known` keys: turns its products with keys into probabilities, and the products of its
// gradient with values, less what all have in common, into the gradient of the former.
void softmax_backward(float* products, float* gradient, int64_t known, int64_t seen, float scale, float log_sum,
                      float common) {
  for (int64_t i = known; i < padded(seen); ++i) products[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < padded(seen); i += LANES) {
    vec p = exponential(load(products + i) * scale - log_sum);
    store(products + i, p);
    store(gradient + i, p * (load(gradient + i) - common) * scale);
  }
  for (int64_t i = known; i < padded(seen); ++i) gradient[i] = 0;
}

template <typename S>
void attend_backward_all(const Tensor& backprops, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& lse, float scale, const Angles& turned, Tensor& to_q, Tensor& to_k,
                         Tensor& to_v) {
  int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3), group = H / k.size(1), TP = padded(T);
  auto qs = heads<S>(q), ks = heads<S>(k), vs = heads<S>(v);
  auto gq = heads<S>(to_q), gk = heads<S>(to_k), gv = heads<S>(to_v);
  const S* g = reinterpret_cast<const S*>(backprops.const_data_ptr());
  const S* o = reinterpret_cast<const S*>(out.const_data_ptr());
  const float* l = lse.const_data_ptr<float>();
  int64_t stride = H * E;
  at::parallel_for(0, B * k.size(1), 1, [&](int64_t from, int64_t to) {
    Scratch scratch(4 * T * E + 2 * E * TP + QUERIES * (2 * TP + 3 * E));
    float *keys = scratch.take(T * E), *values = scratch.take(T * E);
    float *keys_t = scratch.take(E * TP), *values_t = scratch.take(E * TP);
    float *sum_k = scratch.take(T * E), *sum_v = scratch.take(T * E);
    float *probabilities = scratch.take(QUERIES * TP), *scores = scratch.take(QUERIES * TP);
    float *queries = scratch.take(QUERIES * E), *gradients = scratch.take(QUERIES * E);
    float* result = scratch.take(QUERIES * E);
    for (int64_t index = from; index < to; ++index) {
      int64_t b = index / k.size(1), kv = index % k.size(1);
      widen(ks.at(b, kv), ks.token, T, E, keys);
      turned.forth(keys, T, 0);
      widen(vs.at(b, kv), vs.token, T, E, values);
      transpose(keys, T, E, keys_t, TP);
      transpose(values, T, E, values_t, TP);
      std::memset(sum_k, 0, T * E * sizeof(float));
      std::memset(sum_v, 0, T * E * sizeof(float));
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        for (int64_t first = 0; first < T; first += QUERIES) {
          int64_t rows = std::min(QUERIES, T - first), seen = first + rows;
          const S *gs = g + (b * T + first) * stride + h * E, *os = o + (b * T + first) * stride + h * E;
          widen(qs.at(b, h) + first * qs.token, qs.token, rows, E, queries);
          turned.forth(queries, rows, first);
          widen(gs, stride, rows, E, gradients);
          multiply(rows, padded(seen), E, queries, E, 1, keys_t, TP, probabilities, TP, false);
          multiply(rows, padded(seen), E, gradients, E, 1, values_t, TP, scores, TP, false);
          for (int64_t r = 0; r < rows; ++r) {
            vec inner{};
            for (int64_t i = 0; i < E; i += LANES) inner += load(gradients + r * E + i) * load(os + r * stride + i);
            float log_sum = l[(b * H + h) * T + first + r];
            softmax_backward(probabilities + r * TP, scores + r * TP, first + r + 1, seen, scale, log_sum, sum(inner));
          }
          multiply(rows, E, seen, scores, TP, 1, keys, E, result, E, false);
          turned.back(result, rows, first);
          narrow(result, rows, E, gq.at(b, h) + first * gq.token, gq.token);
          multiply(seen, E, rows, scores, 1, TP, queries, E, sum_k, E, true);
          multiply(seen, E, rows, probabilities, 1, TP, gradients, E, sum_v, E, true);
        }
      }
      turned.back(sum_k, T, 0);
      narrow(sum_k, T, E, gk.at(b, kv), gk.token);
      narrow(sum_v, T, E, gv.at(b, kv), gv.token);
    }
  });
}

// Gradients of q, k and v, each (B, H, T, E) of its own number of heads.
std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& backprops, const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& out, const Tensor& lse,
                                                   double scale, const std::optional<Tensor>& cos,
                                                   const std::optional<Tensor>& sin) {
  check_heads(q, k, v);
  check_angles(q, cos, sin);
  int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3);
  check("backprops", backprops, {B, T, H, E}, q.scalar_type());
  check("out", out, {B, T, H, E}, q.scalar_type());
  check("lse", lse, {B, H, T}, at::kFloat);
  auto like = [](const Tensor& x) {  // token by token, as the layers before have their outputs
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  Tensor to_q = like(q), to_k = like(k), to_v = like(v);
  auto run = [&](auto own) {
    attend_backward_all<decltype(own)>(backprops, q, k, v, out, lse, static_cast<float>(scale), angles(cos, sin), to_q,
                                       to_k, to_v);
  };
  q.scalar_type() == at::kBFloat16 ? run(bits16()) : run(0.0f);
  return {to_q, to_k, to_v};
}

}  // namespace

TORCH_LIBRARY(gradsift, m) {
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType precision) -> (Tensor, Tensor, Tensor)",
        &norm);
  m.def("norm_backward(Tensor backprops, Tensor x, Tensor weight, Tensor means, Tensor scales, bool centred) -> Tensor",
        &norm_backward);
  m.def("gelu(Tensor x) -> (Tensor, Tensor)", &gelu);
  m.def("gated(Tensor both) -> Tensor", &gated);
  m.def("gated_backward(Tensor backprops, Tensor both) -> Tensor", &gated_backward);
  m.def("product(Tensor x, Tensor packed, Tensor? bias, int width) -> Tensor", &product);
  m.def("product_times(Tensor x, Tensor packed, Tensor factor) -> Tensor", &product_times);
  m.def("product_gelu(Tensor x, Tensor packed, Tensor? bias, int width) -> (Tensor, Tensor)", &product_gelu);
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor chosen, int vocabulary, bool wants_gradient)"
        " -> Tensor", &cross_entropy_);
  m.def("attend(Tensor q, Tensor k, Tensor v, float scale, Tensor? cos=None, Tensor? sin=None)"
        " -> (Tensor, Tensor)", &attend);
  m.def("attend_backward(Tensor backprops, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
        "Tensor? cos=None, Tensor? sin=None)"
        " -> (Tensor, Tensor, Tensor)", &attend_backward);
}
