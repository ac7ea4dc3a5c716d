// Regularised key/value merge on the CPU: the part shared by all layers, and the part per layer.
//
// Minimise |(W - W0) C_reg^T|^2 + ridge |W - W0|^2 + sum_j mu_j |W c_j - v_j|^2, mu_j = infinity
// being the hard constraint W c_j = v_j. Setting the derivative to zero (or the KKT system for hard
// rows) gives, with Q = C_reg^T C_reg + ridge I,
//
//   A = Q^-1 C^T,   T = C A + diag(1 / mu),   E = T^-1,   B = E A^T,   W_l = W0_l + R_l B,
//   R_l = V_l - W0_l C^T, for concept weights R_l = [ (W_1 - W0) C_1^T | ... | (W_N - W0) C_N^T ].
//
// A, T, E, B do not depend on the layer; merge_solve.h has how they are found. Backward of the part
// per layer, G_l = dL/dW_l:
//
//   dR_l = G_l B^T          dW0_l = G_l - dR_l C      dW_n,l = dR_n,l C_n      dV_l = dR_l
//   dB = sum_l R_l^T G_l    dC_n = sum_l dR_n,l^T (W_n,l - W0_l)   or   dC = -sum_l dR_l^T W0_l
//
// The derivatives of B are small and are left to immunize_ext/ops/merge_saddle.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../merge_problem.h"
#include "../merge_solve.h"
#include "../tensors.h"
#include "large_outputs.h"
#include "row_kernels.h"

namespace immunize_ext {
namespace {

using at::Tensor;
using at::TensorList;

// ---- solve: the part shared by all layers
// --------------------------------------------------------

// Pivoted Cholesky of T [s, s] scaled to unit diagonal. A pivot is then the squared sine of the
// angle between a row and the span of those already kept, so the tolerance has no units.
int64_t pivoted_cholesky(
    const double* t, int64_t s, double rank_rtol, double* triangle, int64_t* order) {
  std::vector<double> scale(s), pivot(s, 1.0), factor(s * s, 0.0);
  for (int64_t j = 0; j < s; ++j) {
    const double diagonal = t[j * s + j];
    scale[j] = diagonal > 0.0 ? std::sqrt(diagonal) : 1.0;
    if (!(diagonal > 0.0))
      pivot[j] = 0.0;  // a zero row of C: it constrains nothing
  }
  int64_t rank = 0;
  for (; rank < s; ++rank) {
    // The first of equal pivots wins, so an earlier row is kept and its repeat dropped.
    const int64_t best = std::max_element(pivot.begin(), pivot.end()) - pivot.begin();
    if (!(pivot[best] > rank_rtol))
      break;
    const double root = std::sqrt(pivot[best]);
    for (int64_t j = 0; j < s; ++j) {
      if (pivot[j] < 0.0)
        continue;  // kept already
      double value = t[j * s + best] / (scale[j] * scale[best]);
      for (int64_t k = 0; k < rank; ++k)
        value -= factor[j * s + k] * factor[best * s + k];
      factor[j * s + rank] = value / root;
    }
    factor[best * s + rank] = root;
    for (int64_t j = 0; j < s; ++j)
      if (pivot[j] >= 0.0)
        pivot[j] = std::max(0.0, pivot[j] - factor[j * s + rank] * factor[j * s + rank]);
    pivot[best] = -1.0;
    order[rank] = best;
  }
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t k = 0; k <= i; ++k)
      triangle[i * s + k] = scale[order[i]] * factor[order[i] * s + k];
  int64_t next = rank;
  for (int64_t j = 0; j < s; ++j)
    if (!(pivot[j] < 0.0)) {
      triangle[next * s + next] = 1.0;
      order[next++] = j;
    }
  return rank;
}

// Operations that are not worth a second thread. Below, no parallel region is opened at all: in a
// process that was forked after threads ran, one would never end.
constexpr int64_t kSerialOperations = 1 << 18;

// LAPACK and BLAS that split one solve over their threads change the last bits with their number.
// Inside a parallel region they use one thread. Two items: for a single one there is no region.
template <typename Function>
void on_one_thread(int64_t operations, const Function& function) {
  const auto run = [&](int64_t begin, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const OneThread one_thread;  // there is no region around small ones
    if (begin == 0)
      function();
  };
  if (operations <= kSerialOperations)
    run(0, 1);
  else
    at::parallel_for(0, 2, 1, run);
}

// L^-1 Y, or L^-T Y for upper = true, in groups of right-hand sides that do not depend on the
// number of threads, each solved by one.
Tensor solve_in_groups(const Tensor& triangle, const Tensor& right, bool upper) {
  constexpr int64_t kGroup = 16;
  const int64_t batch = right.size(0), d = right.size(1), s = right.size(2);
  const int64_t groups = (s + kGroup - 1) / kGroup;
  const Tensor solution = at::empty({batch, s, d}, right.options()).mT();
  const auto solve = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const OneThread one_thread;
    for (int64_t k = begin; k < std::min(end, batch * groups); ++k) {
      const int64_t i = k / groups, first = k % groups * kGroup;
      const int64_t count = std::min(kGroup, s - first);
      solution[i]
          .narrow(1, first, count)
          .copy_(at::linalg_solve_triangular(triangle[i], right[i].narrow(1, first, count), upper));
    }
  };
  if (batch * d * d * s <= kSerialOperations)
    solve(0, batch * groups);
  else
    at::parallel_for(0, std::max<int64_t>(batch * groups, 2), 1, solve);
  return solution;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> merge_solve(
    const Tensor& chol,              // [*, d, d] float64, lower
    const Tensor& c,                 // [*, s, d] float64
    const Tensor& inverse_hardness,  // [*, s] float64
    double rank_rtol,
    bool average) {
  const SolveProblem p = make_solve_problem(chol, c, inverse_hardness);
  const int64_t operations = p.batch * p.s * p.s * (p.d + p.s);
  const auto integers = c.options().dtype(at::kLong);
  const Pivoted v{
      at::zeros({p.batch, p.s, p.s}, c.options()), at::empty({p.batch, p.s}, integers),
      at::empty({p.batch}, integers)};
  // T as the Gram matrix of Z = L^-1 C^T: positive semidefinite whatever the rounding, and twice
  // as many digits of a small angle between constraints as C Q^-1 C^T would keep.
  const Tensor z = solve_in_groups(p.chol, p.c.mT(), /*upper=*/false);
  Tensor root, basis, defect, finite, b;
  on_one_thread(operations, [&] {
    Tensor t = z.mT().matmul(z);
    t.diagonal(0, -2, -1).add_(p.inverse_hardness);
    t = t.contiguous();
    for (int64_t i = 0; i < p.batch; ++i)
      v.rank.mutable_data_ptr<int64_t>()[i] = pivoted_cholesky(
          t.const_data_ptr<double>() + i * p.s * p.s, p.s, rank_rtol,
          v.triangle.mutable_data_ptr<double>() + i * p.s * p.s,
          v.order.mutable_data_ptr<int64_t>() + i * p.s);
    std::tie(root, basis, defect) = solve_constraints(p, z, t, v, average);
    finite = t.isfinite().flatten(1).all(-1);
  });
  const Tensor moved = solve_in_groups(p.chol.mT(), basis, /*upper=*/true);
  on_one_thread(operations, [&] { b = root.matmul(moved.mT()).contiguous(); });
  const Tensor rank = v.rank.masked_fill(finite.logical_not(), -1);
  return {p.shaped(b), p.shaped(root), p.shaped(basis), p.shaped(defect), p.shaped(rank)};
}

// ---- apply: the part per layer
// -------------------------------------------------------------------

// Rows of a block. 32 rows of 768 float32 columns and the concept differences of the same block
// stay in a 1 MiB second-level cache next to C and B.
constexpr int64_t kBlockRows = 32;
// Partial sums of dB and dC: a fixed number, so that the order of addition does not depend on
// threads.
constexpr int64_t kPartialSums = 32;

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

struct Block {
  int64_t batch, layer, begin, rows;
};

std::vector<Block> split_into_blocks(int64_t batch, const std::vector<Tensor>& base) {
  std::vector<Block> blocks;
  for (int64_t b = 0; b < batch; ++b)
    for (size_t l = 0; l < base.size(); ++l)
      for (int64_t begin = 0; begin < base[l].size(-2); begin += kBlockRows)
        blocks.push_back(
            {b, static_cast<int64_t>(l), begin, std::min(kBlockRows, base[l].size(-2) - begin)});
  return blocks;
}

template <typename scalar_t>
const scalar_t* rows_of(const Tensor& t, const Block& block) {
  return t.const_data_ptr<scalar_t>() + (block.batch * t.size(-2) + block.begin) * t.size(-1);
}

template <typename scalar_t>
scalar_t* mutable_rows_of(const Tensor& t, const Block& block) {
  return t.mutable_data_ptr<scalar_t>() + (block.batch * t.size(-2) + block.begin) * t.size(-1);
}

// The block in the accumulation type: the tensor itself where the types agree, a copy otherwise.
template <typename scalar_t, typename acc_t>
const acc_t* widen(const scalar_t* from, int64_t count, std::vector<acc_t>& scratch) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return from;
  } else {
    scratch.resize(count);
    for (int64_t i = 0; i < count; ++i)
      scratch[i] = static_cast<acc_t>(from[i]);
    return scratch.data();
  }
}

template <typename scalar_t, typename acc_t>
void narrow(const acc_t* from, int64_t count, scalar_t* to) {
  if constexpr (!std::is_same_v<scalar_t, acc_t>)
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<scalar_t>(from[i]);
}

template <typename scalar_t, typename acc_t>
void difference(const scalar_t* from, const acc_t* base, int64_t count, acc_t* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<acc_t>(from[i]) - base[i];
}

// Scratch of one thread.
template <typename acc_t>
struct Scratch {
  std::vector<acc_t> base, grad, adapted, out, difference, dr;
};

// r = values - r, where r = W0 c. A value that W0 gives already, up to the rounding of a dot
// product, is no edit: without the exact zero an identity edit would stir the last digits of every
// weight.
template <typename acc_t>
void subtract_from_values(
    const MergeProblem& p, const acc_t* values, const acc_t* base, const Block& block, acc_t* r) {
  const double* token_norm = p.token_norm.const_data_ptr<double>() + block.batch * p.s;
  const double unit = 2.0 * std::numeric_limits<acc_t>::epsilon();
  for (int64_t i = 0; i < block.rows; ++i) {
    double squared = 0.0;
    for (int64_t k = 0; k < p.d; ++k)
      squared += static_cast<double>(base[i * p.d + k]) * static_cast<double>(base[i * p.d + k]);
    const double rounding = unit * std::sqrt(squared);
    for (int64_t j = 0; j < p.s; ++j) {
      const acc_t edit = values[i * p.s + j] - r[i * p.s + j];
      // A row of W0 that is not finite has an infinite norm: nothing about it is rounding.
      const bool none = std::isfinite(rounding) &&
                        std::abs(static_cast<double>(edit)) <= rounding * token_norm[j];
      r[i * p.s + j] = none ? acc_t(0) : edit;
    }
  }
}

// The largest |x|; infinity if one of them is, or is a NaN.
template <typename T>
double largest_of(const T* x, int64_t count) {
  T largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const T size = std::abs(x[i]);
    largest = size > largest ? size : largest;
    finite &= size <= std::numeric_limits<T>::max();
  }
  return finite ? static_cast<double>(largest) : std::numeric_limits<double>::infinity();
}

template <typename scalar_t>
bool all_finite(const scalar_t* x, int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const acc_t value = static_cast<acc_t>(x[i]);
    finite &= value - value == acc_t(0);
  }
  return finite;
}

// The status of the block. R B is at most s max|R| max|B|; as long as that stays below half a unit
// in the last place of the largest number, no finite weight can be pushed over it, and the weights
// need not be looked at. Every entry of W0 and of every target meets a product in R, so R is finite
// only if they are.
template <typename scalar_t>
int status_of(
    const accumulate_t<scalar_t>* r,
    int64_t edits,
    double growth,
    const scalar_t* out,
    int64_t count) {
  const double largest = largest_of(r, edits);
  if (!std::isfinite(largest))
    return kNotFinite;
  const double harmless = static_cast<double>(std::numeric_limits<scalar_t>::max()) / 4.0 *
                          static_cast<double>(std::numeric_limits<scalar_t>::epsilon());
  return largest * growth <= harmless || all_finite(out, count) ? kMerged : kOverflow;
}

// Returns the status of the block; growth is s max|B|.
template <typename scalar_t>
int apply_block(
    const MergeProblem& p,
    const Block& block,
    double growth,
    bool past_caches,
    Scratch<accumulate_t<scalar_t>>& scratch,
    std::vector<Tensor>& merged,
    std::vector<Tensor>& residual) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t count = block.rows * p.d;
  const acc_t* c = p.c.const_data_ptr<acc_t>() + block.batch * p.s * p.d;
  const acc_t* b = p.b.const_data_ptr<acc_t>() + block.batch * p.s * p.d;
  const acc_t* base =
      widen<scalar_t, acc_t>(rows_of<scalar_t>(p.base[block.layer], block), count, scratch.base);
  acc_t* r = mutable_rows_of<acc_t>(residual[block.layer], block);
  if (p.targets_are_values) {
    const acc_t* values = rows_of<acc_t>(p.targets[block.layer], block);
    rows::multiply_transposed<acc_t>(base, nullptr, block.rows, c, p.s, p.d, r, p.s);
    subtract_from_values(p, values, base, block, r);
  } else {
    for (int64_t n = 0; n < p.concepts(); ++n) {
      const acc_t* adapted = widen<scalar_t, acc_t>(
          rows_of<scalar_t>(p.target(n, block.layer), block), count, scratch.adapted);
      rows::multiply_transposed<acc_t>(
          adapted, base, block.rows, c + p.first_token[n] * p.d, p.tokens(n), p.d,
          r + p.first_token[n], p.s);
    }
  }
  scalar_t* out = mutable_rows_of<scalar_t>(merged[block.layer], block);
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    rows::add_product<acc_t>(base, acc_t(1), r, p.s, block.rows, p.s, b, p.d, out, past_caches);
  } else {
    scratch.out.resize(count);
    rows::add_product<acc_t>(
        base, acc_t(1), r, p.s, block.rows, p.s, b, p.d, scratch.out.data(), false);
    narrow(scratch.out.data(), count, out);
  }
  return status_of<scalar_t>(r, block.rows * p.s, growth, out, count);
}

// Whether the weights of one model are more than caches hold: whoever reads the result meets memory
// either way, and writing past the caches saves fetching what is overwritten.
bool outgrows_caches(const MergeProblem& p) {
  constexpr int64_t kCaches = int64_t{1} << 25;
  int64_t bytes = 0;
  for (const Tensor& t : p.base)
    bytes += static_cast<int64_t>(t.nbytes());
  return bytes > kCaches;
}

// Blocks that one thread should have at least.
int64_t grain_of(const MergeProblem& p) {
  const int64_t operations = kBlockRows * (p.s + 1) * (p.d + 1);
  return std::max<int64_t>(1, kSerialOperations / operations);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> merge_apply(
    TensorList base,     // L x [*, o_l, d]
    TensorList targets,  // N L x [*, o_l, d] or L x [*, o_l, s]
    at::IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,    // [*, s, d]
    const Tensor& b) {  // [*, s, d]
  const MergeProblem p =
      make_merge_problem("merge_apply", base, targets, rows, targets_are_values, c, b);
  pool::begin_call();
  std::vector<Tensor> merged = empty_large_like(p.base, p.d, p.dtype);
  std::vector<Tensor> residual = allocate(p.base, p.s, p.accumulate);
  const std::vector<Block> blocks = split_into_blocks(p.batch, p.base);
  const bool past_caches = outgrows_caches(p);
  std::vector<std::atomic<int>> found(p.batch * p.layers());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.dtype, "merge_apply", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const double growth =
        static_cast<double>(p.s) * largest_of(p.b.const_data_ptr<acc_t>(), p.b.numel());
    const int64_t count = static_cast<int64_t>(blocks.size());
    at::parallel_for(0, count, grain_of(p), [&](int64_t begin, int64_t end) {
      Scratch<acc_t> scratch;
      for (int64_t i = begin; i < end; ++i) {
        const int one =
            apply_block<scalar_t>(p, blocks[i], growth, past_caches, scratch, merged, residual);
        if (one != kMerged)
          found[blocks[i].batch * p.layers() + blocks[i].layer].fetch_or(one);
      }
      rows::finish_writes();
    });
  });
  const Tensor status = at::empty({p.batch, p.layers()}, c.options().dtype(at::kInt));
  std::copy(found.begin(), found.end(), status.mutable_data_ptr<int>());
  return {merged, residual, p.shaped(status)};
}

// What a block of the backward pass adds to: dB and dC in float64, one pair a partial sum.
template <typename scalar_t>
void apply_backward_block(
    const MergeProblem& p,
    const Block& block,
    const std::vector<Tensor>& grad,
    const std::vector<Tensor>& residual,
    bool past_caches,
    Scratch<accumulate_t<scalar_t>>& scratch,
    const std::vector<Tensor>& grad_base,
    const std::vector<Tensor>& grad_targets,
    double* grad_c,
    double* grad_b) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t count = block.rows * p.d;
  const acc_t* c = p.c.const_data_ptr<acc_t>() + block.batch * p.s * p.d;
  const acc_t* b = p.b.const_data_ptr<acc_t>() + block.batch * p.s * p.d;
  const acc_t* g =
      widen<scalar_t, acc_t>(rows_of<scalar_t>(grad[block.layer], block), count, scratch.grad);
  scratch.dr.resize(block.rows * p.s);
  acc_t* dr = scratch.dr.data();
  rows::multiply_transposed<acc_t>(g, nullptr, block.rows, b, p.s, p.d, dr, p.s);

  const auto write = [&](const acc_t* base, acc_t sign, const acc_t* coefficients, int64_t q,
                         const acc_t* y, const Tensor& to) {
    scalar_t* out = mutable_rows_of<scalar_t>(to, block);
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      rows::add_product<acc_t>(
          base, sign, coefficients, p.s, block.rows, q, y, p.d, out, past_caches);
    } else {
      scratch.out.resize(count);
      rows::add_product<acc_t>(
          base, sign, coefficients, p.s, block.rows, q, y, p.d, scratch.out.data(), false);
      narrow(scratch.out.data(), count, out);
    }
  };
  if (!grad_base.empty())
    write(g, acc_t(-1), dr, p.s, c, grad_base[block.layer]);
  if (!grad_targets.empty()) {
    if (p.targets_are_values) {
      std::copy_n(dr, block.rows * p.s, mutable_rows_of<acc_t>(grad_targets[block.layer], block));
    } else {
      for (int64_t n = 0; n < p.concepts(); ++n)
        write(
            nullptr, acc_t(1), dr + p.first_token[n], p.tokens(n), c + p.first_token[n] * p.d,
            grad_targets[n * p.layers() + block.layer]);
    }
  }
  if (grad_b != nullptr) {
    const acc_t* r = rows_of<acc_t>(residual[block.layer], block);
    rows::accumulate_product<acc_t>(r, p.s, block.rows, p.s, g, p.d, grad_b);
  }
  if (grad_c == nullptr)
    return;
  const acc_t* base =
      widen<scalar_t, acc_t>(rows_of<scalar_t>(p.base[block.layer], block), count, scratch.base);
  if (p.targets_are_values) {
    for (int64_t i = 0; i < block.rows * p.s; ++i)
      dr[i] = -dr[i];
    rows::accumulate_product<acc_t>(dr, p.s, block.rows, p.s, base, p.d, grad_c);
    return;
  }
  scratch.difference.resize(count);
  for (int64_t n = 0; n < p.concepts(); ++n) {
    difference(
        rows_of<scalar_t>(p.target(n, block.layer), block), base, count, scratch.difference.data());
    rows::accumulate_product<acc_t>(
        dr + p.first_token[n], p.s, block.rows, p.tokens(n), scratch.difference.data(), p.d,
        grad_c + p.first_token[n] * p.d);
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> merge_apply_backward(
    TensorList grad,     // L x [*, o_l, d]
    TensorList base,     // L x [*, o_l, d]
    TensorList targets,  // N L x [*, o_l, d] or L x [*, o_l, s]
    at::IntArrayRef rows,
    bool targets_are_values,
    const Tensor& c,      // [*, s, d]
    const Tensor& b,      // [*, s, d]
    TensorList residual,  // L x [*, o_l, s]
    bool need_base,
    bool need_targets,
    bool need_c,
    bool need_b) {
  const MergeProblem p =
      make_merge_problem("merge_apply_backward", base, targets, rows, targets_are_values, c, b);
  const std::vector<Tensor> g =
      checked_layers("merge_apply_backward", "grad", grad, p, p.d, p.dtype);
  const std::vector<Tensor> r =
      checked_layers("merge_apply_backward", "residual", residual, p, p.s, p.accumulate);
  std::vector<Tensor> grad_base, grad_targets;
  pool::begin_call();
  if (need_base)
    grad_base = empty_large_like(p.base, p.d, p.dtype);
  if (need_targets)
    for (const Tensor& t : p.targets)
      grad_targets.push_back(empty_large(t.sizes(), t.scalar_type()));
  const bool past_caches = outgrows_caches(p);
  const auto options = c.options();
  const int64_t size = p.s * p.d;
  Tensor grad_c = at::empty({0}, options), grad_b = at::empty({0}, options);
  if (need_c)
    grad_c = at::zeros({p.batch, p.s, p.d}, options);
  if (need_b)
    grad_b = at::zeros({p.batch, p.s, p.d}, options);
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    std::vector<Block> blocks = split_into_blocks(1, p.base);
    for (Block& block : blocks)
      block.batch = batch;
    const int64_t count = static_cast<int64_t>(blocks.size());
    const int64_t sums = std::min(kPartialSums, count);
    // Where no sum over rows is asked for, blocks need no grouping; the order is free.
    const Tensor partial_c = at::zeros({need_c ? sums : 0, size}, options);
    const Tensor partial_b = at::zeros({need_b ? sums : 0, size}, options);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.dtype, "merge_apply_backward", [&] {
      const int64_t grain = count <= grain_of(p) ? sums : 1;
      at::parallel_for(0, sums, grain, [&](int64_t begin, int64_t end) {
        Scratch<accumulate_t<scalar_t>> scratch;
        for (int64_t k = begin; k < end; ++k) {
          double* sum_c = need_c ? partial_c.mutable_data_ptr<double>() + k * size : nullptr;
          double* sum_b = need_b ? partial_b.mutable_data_ptr<double>() + k * size : nullptr;
          for (int64_t i = k * count / sums; i < (k + 1) * count / sums; ++i)
            apply_backward_block<scalar_t>(
                p, blocks[i], g, r, past_caches, scratch, grad_base, grad_targets, sum_c, sum_b);
        }
        rows::finish_writes();
      });
    });
    if (need_c)
      grad_c[batch] = partial_c.sum(0).view({p.s, p.d});
    if (need_b)
      grad_b[batch] = partial_b.sum(0).view({p.s, p.d});
  }
  if (need_c)
    grad_c = grad_c.reshape(c.sizes());
  if (need_b)
    grad_b = grad_b.reshape(c.sizes());
  return {grad_base, grad_targets, grad_c, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(immunize_ext, CPU, m) {
  m.impl("merge_solve", &merge_solve);
  m.impl("merge_apply", &merge_apply);
  m.impl("merge_apply_backward", &merge_apply_backward);
}

}  // namespace immunize_ext
