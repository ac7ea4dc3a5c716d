// Inner products of per-sample gradients on the CPU: which route, scratch and threads (khatri_rao.inl).

#include "../khatri_rao.h"

#include <algorithm>

#include "../tensors.h"
#include "full_decomposition.h"
#include "large_outputs.h"
#include "spectrum_kernels.h"
#include "threads.h"

namespace immunize_ext {

using namespace spectrum;

namespace {

// Numbers of a block of J, so that it and its packed copy stay in a cache of 4 MiB.
constexpr int64_t kOuterNumbers = int64_t{1} << 18;

// Pieces of work of this cost that are worth a thread.
int64_t grain_of(int64_t cost) {
  return std::max<int64_t>(1, kWorthAThread / cost);
}

struct Layer {
  int64_t n, t, d, o;
  bool bias;

  int64_t tokens() const {
    return n * t;
  }
  // Products for a pair of samples.
  int64_t pair_cost() const {
    return t * t * (d + o);
  }
  bool by_outer_products() const {
    return t > 1 && d * o < pair_cost();
  }
  int64_t cost() const {
    return n * n * std::min(pair_cost(), d * o);
  }
  // With the column of ones that a bias is the weight of.
  int64_t a_width() const {
    return widened(d + (bias ? 1 : 0));
  }
  int64_t g_width() const {
    return widened(o);
  }
  // Columns of a in a block of J, and how many there are in all.
  int64_t outer_columns() const {
    return (d + (bias ? 1 : 0) + kRows - 1) / kRows * kRows;
  }
  int64_t outer_block() const {
    const int64_t fits = kOuterNumbers / (n * g_width()) / kRows * kRows;
    return std::clamp(fits, kRows, outer_columns());
  }
};

Layer layer_of(const Tensor& a, const Tensor& g, bool bias) {
  return {a.size(1), a.size(2), a.size(3), g.size(3), bias};
}

// [n t, side] of one element of the batch.
Tensor tokens_of(const Tensor& x, int64_t b) {
  return x[b].flatten(0, 1).to(at::kDouble);
}

// In panels of 12 rows.
Tensor packed(const Tensor& x) {
  const int64_t rows = x.size(0), depth = x.size(1);
  const Tensor out = empty_large({widened(rows), depth}, at::kDouble);
  const double* from = x.const_data_ptr<double>();
  double* to = out.mutable_data_ptr<double>();
  parallel_for(widened(rows) / kPanel, grain_of(kPanel * depth), [&](int64_t begin, int64_t end) {
    IMMUNIZE_EXT_CHOSEN(pack_rows(from, rows, depth, begin, end, to));
  });
  return out;
}

// Zeros for wide rows of tokens; a group of 4 rows may begin at the last of them.
Tensor wide_zeros(int64_t rows, int64_t width) {
  const Tensor out = empty_large({widened(rows + kRows), width}, at::kDouble);
  return out.zero_();
}

Tensor wide(const Tensor& x, int64_t width, bool ones) {
  const Tensor out = wide_zeros(x.size(0), width);
  const Tensor rows = out.slice(0, 0, x.size(0));
  rows.slice(1, 0, x.size(1)).copy_(x);
  if (ones)
    rows.select(1, x.size(1)).fill_(1.0);
  return out;
}

// f(begin, end) over samples in blocks whose first is a multiple of 12; cost: of a sample. Of a triangle
// the first and the last block are one piece of work, the second and the last but one, and so on.
template <typename F>
void over_samples(int64_t n, int64_t unit, int64_t cost, bool triangle, const F& f) {
  const int64_t units = (n + unit - 1) / unit, pieces = triangle ? (units + 1) / 2 : units;
  const auto one = [&](int64_t which) { f(which * unit, std::min(n, (which + 1) * unit)); };
  parallel_for(pieces, grain_of(unit * cost), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      one(piece);
      if (triangle && units - 1 - piece != piece)
        one(units - 1 - piece);
    }
  });
}

void pair_gram(const Layer& layer, const Tensor& a, const Tensor& g, double* k) {
  const Tensor of_a = packed(a), of_g = packed(g);
  over_samples(
      layer.n, samples_of_unit(layer.t), layer.n * layer.pair_cost() / 2, true,
      [&](int64_t begin, int64_t end) {
        IMMUNIZE_EXT_CHOSEN(pair_products(
            layer.n, layer.t, of_a.const_data_ptr<double>(), layer.d, of_g.const_data_ptr<double>(),
            layer.o, layer.bias ? 1.0 : 0.0, begin, end, k));
      });
}

// Blocks of J, one after the other: f(first column of a, their number, J [n, columns g_width]).
template <typename F>
void over_outer_products(const Layer& layer, const Tensor& a, const Tensor& g, const F& f) {
  const int64_t block = layer.outer_block(), rows = widened(layer.n);
  const Tensor memory = empty_large({rows * block * layer.g_width()}, at::kDouble);
  for (int64_t first = 0; first < layer.outer_columns(); first += block) {
    const int64_t count = std::min(block, layer.outer_columns() - first);
    const Tensor j =
        memory.slice(0, 0, rows * count * layer.g_width()).view({rows, count * layer.g_width()});
    j.zero_();
    parallel_for(layer.n, grain_of(layer.t * j.size(1)), [&](int64_t begin, int64_t end) {
      IMMUNIZE_EXT_CHOSEN(outer_products(
          layer.t, a.const_data_ptr<double>(), layer.a_width(), g.const_data_ptr<double>(),
          layer.g_width(), first, count, begin, end, j.mutable_data_ptr<double>()));
    });
    f(first, count, j);
  }
}

void outer_gram(const Layer& layer, const Tensor& a, const Tensor& g, double* k) {
  const Tensor of_a = wide(a, layer.a_width(), layer.bias), of_g = wide(g, layer.g_width(), false);
  over_outer_products(layer, of_a, of_g, [&](int64_t, int64_t, const Tensor& j) {
    const Tensor rows = packed(j.slice(0, 0, layer.n));
    over_samples(
        layer.n, samples_of_unit(1), layer.n * j.size(1) / 2, true,
        [&](int64_t begin, int64_t end) {
          IMMUNIZE_EXT_CHOSEN(
              add_gram_rows(layer.n, rows.const_data_ptr<double>(), j.size(1), begin, end, k));
        });
  });
}

// Gradients, wide; undefined where not needed.
struct Gradients {
  Tensor a, g;
};

Gradients pair_gradients_of(
    const Layer& layer,
    const double* h,
    const Tensor& a,
    const Tensor& g,
    bool need_a,
    bool need_g) {
  const int64_t a_width = widened(layer.d), g_width = layer.g_width();
  // A gradient needs the other operand packed and its own wide.
  const Tensor wide_a = need_a ? wide(a, a_width, false) : Tensor(),
               wide_g = need_g ? wide(g, g_width, false) : Tensor(),
               packed_a = need_g ? packed(a) : Tensor(), packed_g = need_a ? packed(g) : Tensor();
  const Gradients out{
      need_a ? wide_zeros(layer.tokens(), a_width) : Tensor(),
      need_g ? wide_zeros(layer.tokens(), g_width) : Tensor()};
  const auto from = [](const Tensor& x) {
    return x.defined() ? x.const_data_ptr<double>() : nullptr;
  };
  const auto to = [](const Tensor& x) {
    return x.defined() ? x.mutable_data_ptr<double>() : nullptr;
  };
  const PairOperand of_a{from(packed_a), from(wide_a), to(out.a), layer.d};
  const PairOperand of_g{from(packed_g), from(wide_g), to(out.g), layer.o};
  over_samples(
      layer.n, samples_of_unit(layer.t), 2 * layer.n * layer.pair_cost(), false,
      [&](int64_t begin, int64_t end) {
        IMMUNIZE_EXT_CHOSEN(
            pair_gradients(layer.n, layer.t, h, of_a, of_g, layer.bias ? 1.0 : 0.0, begin, end));
      });
  return out;
}

Gradients outer_gradients_of(
    const Layer& layer,
    const Tensor& h,
    const Tensor& a,
    const Tensor& g,
    bool need_a,
    bool need_g) {
  const Tensor of_a = wide(a, layer.a_width(), layer.bias), of_g = wide(g, layer.g_width(), false);
  const Gradients out{
      need_a ? wide_zeros(layer.tokens(), layer.a_width()) : Tensor(),
      need_g ? wide_zeros(layer.tokens(), layer.g_width()) : Tensor()};
  const int64_t n = layer.n, groups = (n + kRows - 1) / kRows;
  const Tensor pairs = at::zeros({groups * kRows, n}, h.options());
  pairs.slice(0, 0, n).copy_(h);
  over_outer_products(layer, of_a, of_g, [&](int64_t first, int64_t count, const Tensor& j) {
    const Tensor dj = empty_large(j.sizes(), at::kDouble);
    dj.zero_();
    parallel_for(
        j.size(1) / kTwoPanels, grain_of(n * n * kTwoPanels), [&](int64_t begin, int64_t end) {
          IMMUNIZE_EXT_CHOSEN(multiply_pairs(
              pairs.const_data_ptr<double>(), groups, n, j.const_data_ptr<double>(), j.size(1),
              begin, end, dj.mutable_data_ptr<double>()));
        });
    parallel_for(n, grain_of(2 * layer.t * j.size(1)), [&](int64_t begin, int64_t end) {
      IMMUNIZE_EXT_CHOSEN(outer_gradients(
          layer.t, dj.const_data_ptr<double>(), of_a.const_data_ptr<double>(), layer.a_width(),
          of_g.const_data_ptr<double>(), layer.g_width(), first, count, begin, end,
          need_a ? out.a.mutable_data_ptr<double>() : nullptr,
          need_g ? out.g.mutable_data_ptr<double>() : nullptr));
    });
  });
  return out;
}

}  // namespace

Tensor cpu_khatri_rao_gram(const Tensor& a, const Tensor& g, bool bias) {
  const Call call;
  pool::begin_call();
  const Layer layer = layer_of(a, g, bias);
  const int64_t batch = a.size(0), n = layer.n;
  const Tensor k = at::zeros({batch, n, n}, a.options().dtype(at::kDouble));
  for_each_matrix(batch, layer.cost(), [&](int64_t b) {
    double* to = k.mutable_data_ptr<double>() + b * n * n;
    const auto gram = layer.by_outer_products() ? outer_gram : pair_gram;
    gram(layer, tokens_of(a, b), tokens_of(g, b), to);
    mirror(to, n, n);
  });
  return k;
}

std::tuple<Tensor, Tensor> cpu_khatri_rao_gradient(
    const Tensor& h, const Tensor& a, const Tensor& g, bool bias, bool need_a, bool need_g) {
  const Call call;
  pool::begin_call();
  const Layer layer = layer_of(a, g, bias);
  const at::TensorOptions options = h.options();
  const Tensor of_a = need_a ? at::empty(a.sizes(), options) : Tensor();
  const Tensor of_g = need_g ? at::empty(g.sizes(), options) : Tensor();
  for_each_matrix(a.size(0), 4 * layer.cost(), [&](int64_t b) {
    const Tensor x = tokens_of(a, b), y = tokens_of(g, b), own = h[b];
    const Gradients found =
        layer.by_outer_products()
            ? outer_gradients_of(layer, own, x, y, need_a, need_g)
            : pair_gradients_of(layer, own.const_data_ptr<double>(), x, y, need_a, need_g);
    const auto take = [&](const Tensor& wide_rows, const Tensor& to) {
      if (to.defined())
        to[b].flatten(0, 1).copy_(wide_rows.slice(0, 0, layer.tokens()).slice(1, 0, to.size(-1)));
    };
    take(found.a, of_a);
    take(found.g, of_g);
  });
  return {of_a, of_g};
}

}  // namespace immunize_ext
