// The two ends of the spectrum of M through the tridiagonal form of its Gram matrix, by one block.
//
// Jacobi finds all singular vectors; the operators ask for two. Here G = Q T Q^T (Householder), the
// ends of T by Sturm counts, two vectors of T by twisted factorisations, back through Q, and then
// the triplets (sigma, u, v) themselves are measured on M, which is what decides. csrc/cpu/
// tridiagonal.inl, sturm.inl and gram_route.inl do the same for the CPU.
//
// What is proven, and what is refused. Forming and reducing G commits an error of norm at most
//     noise = 4 max(t, 16, sqrt(m / 8)) eps lambda_max
// (sums over tiles of at most 256 rows, then over m / 32 tiles at most, whose roundings add up as a
// root mean square).
//
// 1. Counts. Rank and multiplicities are numbers of eigenvalues beyond a threshold, counted at the
//    threshold plus and minus noise. Where the two differ, or where zero is not told from the
//    smallest eigenvalue that counts, the block refuses.
// 2. Triplets. For the thin vector u: w = M u, sigma = |w|, v = w / sigma, r = M^T v - sigma u.
//    Since r^T u = v^T M u - sigma = 0, (sigma, u, v) is exactly a triplet of M - v r^T: backward
//    stable, as a bidiagonal SVD is, if |r| is small. It is accepted if
//        |r| <= 4 sqrt(n + p) eps sigma_max   and   |sigma^2 - lambda| <= noise,
//    the second to tie it to the eigenvalue that was counted. sigma is a Rayleigh quotient, so its
//    own error is only |r|^2 / gap.
// 3. Refinement. With u from T alone, |r| = |G u - lambda u| / sigma is about eps kappa sigma_max.
//    One step of Newton's method with the residual from M,
//        (G - lambda) delta = -sigma r,   delta orthogonal to u,
//    multiplies the error by noise / gap. What remains is rounding in w, eps sigma_max / sigma in v,
//    which v <- v - M (G + lambda)^-1 r takes back.
//
// Refused are matrices with kappa above (4 max(t, 16) eps)^-1/2, 4e6 at t = 64, where G does not
// know the rank; clusters whose number of members is in doubt; and what does not pass the test. The
// block then goes on with Jacobi from the same G.
#pragma once

#include "spectrum_jacobi.cuh"

namespace immunize_ext::spectrum {

constexpr int kSections = 256;   // points at which a block counts, half of them for either end
constexpr int kMostPasses = 20;  // one warp, with 16 points an end, needs 13
constexpr int kMostEnds = 128;   // the largest side
constexpr int kRefinements = 3;
// Off-diagonal parts whose squares sum to less are zero: far below eps lambda_max, and far above
// where the squares lose digits.
constexpr double kTinySquare = 1e-200;

// What a kernel is compiled for: how many threads a block has at most. While T is formed, a row of G
// lives in the registers of `lanes` threads with up to `width` columns each; a vector in those of a
// warp, a lane of which has the entries lane + 32 c.
template <unsigned kThreads, int kLanesOfARow, int kColumnsOfALane>
struct EndsShape {
  static constexpr unsigned threads = kThreads;
  static constexpr unsigned blocks = 256 / threads;  // a multiprocessor has registers for
  static constexpr int lanes = kLanesOfARow;
  static constexpr int width = kColumnsOfALane;
  static constexpr int chunks = lanes * width / kWarp;
};
using EndsTo32 = EndsShape<32, 1, 32>;  // a warp needs no other to wait for
using EndsTo64 = EndsShape<256, 4, 16>;
using EndsTo128 = EndsShape<256, 2, 64>;
__host__ __device__ constexpr unsigned ends_threads(int t) {
  return t <= 32 ? EndsTo32::threads : EndsTo64::threads;
}

// Rows are 4 modulo 16 doubles apart: eight rows times four columns meet no bank twice.
__host__ __device__ constexpr int tridiagonal_stride(int t) {
  return (t + 11) / 16 * 16 + 4;
}
// Doubles in place of V.
__host__ __device__ constexpr int tridiagonal_doubles(int t, unsigned threads) {
  const int vectors = 10 * t + larger(4 * t, 2 * static_cast<int>(threads));
  return t * tridiagonal_stride(t) + larger(vectors, 3 * (t <= 32 ? 32 : t <= 64 ? 64 : 128));
}

// T, the reflectors, and vectors. Reflector i, in row i of a left of the diagonal, has the factor
// tau[i].
struct TridiagonalSpace {
  int t, stride;
  SharedPtr<double> a;               // [t, stride]
  SharedPtr<double> d, e, e_square;  // T: [t], [t - 1], [t - 1]
  SharedPtr<double> tau;             // [t]
  SharedPtr<double> pivots;          // [4, t]; A v while T is formed
  SharedPtr<double> z, u, r;         // [2, t]: vectors of T and of G, residuals
  SharedPtr<double> partial;         // [2, threads], and of no less than [4, t]
  SharedPtr<double> scratch;         // [32]
};

// The sum of x over k in [0, count), at every lane of every warp; count <= 32 chunks.
template <int chunks, typename F>
__device__ __forceinline__ double sum_by_warp(int count, const F& x) {
  double sum = 0.0;
  IMMUNIZE_EXT_UNROLL
  for (int c = 0; c < chunks; ++c) {
    const int k = static_cast<int>(threadIdx.x) % kWarp + kWarp * c;
    if (k < count) {
      sum += x(k);
    }
  }
  return warp_sum(sum);
}

// G -> T. Rows from the last: with the reflector H = I - tau v v^T of row i (v supported on [0, i),
// v_{i-1} = alpha - beta, else the row itself), y = A v and twice = -tau^2 v^T y,
//     H A H = A - (tau v) y^T - (tau y + twice v) v^T.
// A stays in registers. Its next row goes through shared memory, and so does y; every warp works out
// the two sums for itself. So there are two barriers a reflector. A row is padded with zeros, so that
// what registers hold beyond it, which is finite, does not matter.
template <typename Shape>
__device__ __forceinline__ void tridiagonalise(
    const TridiagonalSpace& q, SharedPtr<const double> gram) {
  constexpr int kLanes = Shape::lanes;
  constexpr int kWidth = Shape::width;
  constexpr int kRows = kWarp / kLanes;  // of a warp
  constexpr int kStep = 4;               // columns at a time
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int first_row = thread / kWarp * kRows;
  const int j = thread / kLanes;
  const int sub = thread % kLanes;
  const int t = q.t;
  const SharedPtr<double> y = q.pivots;
  SharedPtr<double> x = y + kLanes * kWidth;
  SharedPtr<double> next_x = x + kLanes * kWidth;
  double own[kWidth];
  const auto publish = [&](SharedPtr<double> to) {
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      const int k = sub + kLanes * c;
      if (k == j) {
        q.d[j] = own[c];
      }
      to[k] = k < j ? own[c] : 0.0;
    }
  };
  IMMUNIZE_EXT_UNROLL
  for (int c = 0; c < kWidth; ++c) {
    const int k = sub + kLanes * c;
    own[c] = j < t && k < t ? gram[packed_index(j, k)] : 0.0;
  }
  if (j == t - 1) {
    publish(x);
  }
  for (int k = thread; k < kLanes * kWidth; k += threads) {
    y[k] = 0.0;
  }
  for (int row = t - 1; row >= 1; --row) {
    __syncthreads();
    // A warp without rows left has nothing to do but to wait.
    const bool works = first_row < row;
    double head = 0.0;
    double tau = 0.0;
    double product = 0.0;
    const auto v = [&](int k) {
      const double value = x[k];
      return k == row - 1 ? head : value;
    };
    if (works) {
      const double square = sum_by_warp<Shape::chunks>(row - 1, [&](int k) {
        const double value = x[k];
        return value * value;
      });
      const double alpha = x[row - 1];
      const bool reflects = square > kTinySquare;
      const double beta = reflects ? -copysign(sqrt(fma(alpha, alpha, square)), alpha) : alpha;
      head = alpha - beta;
      double sums[kStep] = {};
      IMMUNIZE_EXT_UNROLL
      for (int first = 0; first < kWidth; first += kStep) {
        if (kLanes * first < row) {
          IMMUNIZE_EXT_UNROLL
          for (int c = 0; c < kStep; ++c) {
            sums[c] = fma(own[first + c], v(sub + kLanes * (first + c)), sums[c]);
          }
        }
      }
      product = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        product += __shfl_xor_sync(kFullMask, product, offset);
      }
      if (sub == 0 && j < row) {
        y[j] = product;
      }
      tau = reflects ? -1.0 / (beta * head) : 0.0;
      if (thread == 0) {
        q.e[row - 1] = beta;
        q.e_square[row - 1] = beta * beta;
        q.tau[row] = tau;
      }
    }
    __syncthreads();
    if (works) {
      const double along = sum_by_warp<Shape::chunks>(row, [&](int k) {
        const double with = y[k];
        return v(k) * with;
      });
      const double twice = -tau * (tau * along);
      const double v_j = v(j);
      const double left_y = tau * v_j;
      const double left_v = fma(twice, v_j, tau * product);
      IMMUNIZE_EXT_UNROLL
      for (int first = 0; first < kWidth; first += kStep) {
        if (kLanes * first < row) {
          IMMUNIZE_EXT_UNROLL
          for (int c = first; c < first + kStep; ++c) {
            const int k = sub + kLanes * c;
            const double from_y = y[k];
            own[c] = fma(-left_v, v(k), fma(-left_y, from_y, own[c]));
          }
        }
      }
      if (first_row + kRows >= row && j == row - 1) {
        publish(next_x);
      }
      for (int k = thread; k < row; k += threads) {
        q.a[row * q.stride + k] = v(k);
      }
    }
    const SharedPtr<double> free = x;
    x = next_x;
    next_x = free;
  }
  __syncthreads();
}

constexpr int kRescale = 8;  // steps in which minors cannot overflow

// Takes a common power of two out of both.
__device__ __forceinline__ void rescale(double& one, double& other) {
  const long long bits = __double_as_longlong(fmax(fabs(one), fabs(other)));
  const int exponent = smaller(static_cast<int>(bits >> 52), 2046);
  const double factor = __longlong_as_double(static_cast<long long>(2046 - exponent) << 52);
  one *= factor;
  other *= factor;
}

// The number of eigenvalues of T below x: sign changes of the leading minors of T - x,
//     p_i = (d_i - x) p_{i-1} - e_{i-1}^2 p_{i-2}.
// Rounding perturbs d_i - x and e^2 relatively, so the count is that of a matrix within a few
// eps |T|. There is no division, whose latency a block could not hide; a common power of two is
// taken out of both terms every kRescale steps. -1 where two minors in a row vanish.
__device__ __forceinline__ int count_below(const TridiagonalSpace& q, double x) {
  double before = 1.0;
  const double first = q.d[0];
  double minor = first - x;
  unsigned count = minor < 0.0 ? 1 : 0;
  const auto advance = [&](int i) {
    const double diagonal = q.d[i];
    const double coupling = q.e_square[i - 1];
    const double next = fma(diagonal - x, minor, -coupling * before);
    const long long changes = __double_as_longlong(next) ^ __double_as_longlong(minor);
    count += static_cast<unsigned>(static_cast<unsigned long long>(changes) >> 63);
    before = minor;
    minor = next;
  };
  int i = 1;
  IMMUNIZE_EXT_UNROLL_BY(1)
  for (; i + kRescale <= q.t; i += kRescale) {
    IMMUNIZE_EXT_UNROLL
    for (int s = 0; s < kRescale; ++s) {
      advance(i + s);
    }
    rescale(minor, before);
  }
  IMMUNIZE_EXT_UNROLL_BY(1)
  for (; i < q.t; ++i) {
    advance(i);
  }
  return before == 0.0 && minor == 0.0 ? -1 : static_cast<int>(count);
}

// Eigenvalues number `top` and `bottom` (ascending, from 0) of T, to about eps |T|, at every
// thread: both intervals are cut at kSections / 2 points a pass. False where a count broke down.
struct Ends {
  double top, bottom;
  bool found;
};
__device__ __forceinline__ Ends
find_ends(const TridiagonalSpace& q, double norm, int top, int bottom) {
  constexpr int kSlot = kWarp / 2;  // lanes that share a partial count
  const int thread = static_cast<int>(threadIdx.x);
  const int points = smaller(static_cast<int>(blockDim.x), kSections) / 2;
  const int slots = points / kSlot;
  const bool upper = thread < points;
  const bool counts = thread < 2 * points;
  const int s = upper ? thread : thread - points;
  double low[2] = {-0x1p-20 * norm, -0x1p-20 * norm};
  double high[2] = {norm, norm};
  bool broken = false;
  __syncthreads();
  for (int pass = 0; pass < kMostPasses; ++pass) {
    const double widest = fmax(high[0] - low[0], high[1] - low[1]);
    if (!(widest > 2.0 * kEps * norm)) {  // two numbers may lie eps apart
      break;
    }
    const double step[2] = {(high[0] - low[0]) / (points + 1), (high[1] - low[1]) / (points + 1)};
    if (thread / kWarp * kWarp < 2 * points) {
      const double number = s + 1;
      const double x = fma(upper ? step[0] : step[1], number, upper ? low[0] : low[1]);
      const int below = counts ? count_below(q, x) : 0;
      broken = broken || below < 0;
      const unsigned at_most = __ballot_sync(kFullMask, below <= (upper ? top : bottom) ? 1 : 0);
      if (thread % kSlot == 0) {
        const unsigned half = at_most >> (thread % kWarp) & 0xFFFF;
        q.scratch[pass % 2 * 16 + thread / kSlot] = static_cast<double>(__popc(half));
      }
    }
    __syncthreads();
    IMMUNIZE_EXT_UNROLL
    for (int end = 0; end < 2; ++end) {
      double left = 0.0;  // points to the left of the eigenvalue
      for (int slot = 0; slot < slots; ++slot) {
        const double part = q.scratch[pass % 2 * 16 + end * slots + slot];
        left += part;
      }
      const double from = low[end];
      low[end] = left > 0.0 ? fma(step[end], left, from) : from;
      high[end] = left < points ? fma(step[end], left + 1.0, from) : high[end];
    }
  }
  const bool any = __syncthreads_or(broken ? 1 : 0) != 0;
  return Ends{0.5 * (low[0] + high[0]), 0.5 * (low[1] + high[1]), !any};
}

// Numbers of eigenvalues below six points, at every thread: thread s < 6 brings the point s.
struct Counts {
  int below[6];
};
__device__ __forceinline__ Counts count_at(const TridiagonalSpace& q, double point) {
  __syncthreads();
  if (threadIdx.x < 6) {
    q.scratch[threadIdx.x] = static_cast<double>(count_below(q, point));
  }
  __syncthreads();
  Counts counts{};
  IMMUNIZE_EXT_UNROLL
  for (int s = 0; s < 6; ++s) {
    const double value = q.scratch[s];
    counts.below[s] = static_cast<int>(value);
  }
  return counts;
}

// --- Vectors, one warp each ----------------------------------------------------------------------

// The pivots of T - x from the top and from the bottom, for two x, by the block: rows top and bottom
// for x_max, then for x_min. A pivot is the quotient of two minors, which four lanes run through as
// count_below does; all threads divide.
__device__ __forceinline__ void factor_twisted(
    const TridiagonalSpace& q, double x_max, double x_min, double pivot_min) {
  const int chain = static_cast<int>(threadIdx.x);
  const int t = q.t;
  if (chain < 4) {
    const double x = chain < 2 ? x_max : x_min;
    const bool down = chain % 2 == 0;
    const int step = down ? 1 : -1;
    const SharedPtr<double> minors = q.pivots + chain * t;
    const SharedPtr<double> divisors = q.partial + chain * t;
    double before = 0.0;
    double minor = 1.0;
    double coupling = 0.0;
    int i = down ? 0 : t - 1;
    double diagonal = q.d[i];
    for (int count = 1; count <= t; ++count, i += step) {
      const double least = pivot_min * minor;
      double next = fma(diagonal - x, minor, -coupling * before);
      next = fabs(next) < fabs(least) ? -least : next;
      if (count < t) {  // read before the writes: the compiler cannot know that they are apart
        coupling = q.e_square[down ? i : i - 1];
        diagonal = q.d[i + step];
      }
      minors[i] = next;
      divisors[i] = minor;
      before = minor;
      minor = next;
      if (count % kRescale == 0) {
        rescale(minor, before);
      }
    }
  }
  __syncthreads();
  for (int e = chain; e < 4 * t; e += static_cast<int>(blockDim.x)) {
    const double divisor = q.partial[e];
    q.pivots[e] /= divisor;
  }
  __syncthreads();
}

// For vector c of the calling warp: where the two factorisations meet best, and the vector of T, of
// unit length. With gamma_i = top_i + bottom_i - (d_i - x), z_r = 1 at the r of the smallest
// |gamma_r| and the two recurrences away from r, (T - x) z = gamma_r e_r exactly.
template <int chunks>
__device__ __forceinline__ int twisted_vector(const TridiagonalSpace& q, int c, double x) {
  const int t = q.t;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const SharedPtr<double> top = q.pivots + 2 * c * t;
  const SharedPtr<double> bottom = top + t;
  const SharedPtr<double> z = q.z + c * t;
  double best = DBL_MAX;
  int r = t;
  for (int i = lane; i < t; i += kWarp) {
    const double from_top = top[i];
    const double from_bottom = bottom[i];
    const double diagonal = q.d[i];
    const double gamma = fabs(from_top + from_bottom - (diagonal - x));
    if (gamma < best) {
      best = gamma;
      r = i;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullMask, best, offset);
    const int other_r = __shfl_xor_sync(kFullMask, r, offset);
    if (other < best || (other == best && other_r < r)) {
      best = other;
      r = other_r;
    }
  }
  r = r < t ? r : 0;  // nothing but NaN
  for (int i = lane; i < t; i += kWarp) {
    double ratio = 1.0;
    if (i != r) {
      const double coupling = q.e[i < r ? i : i - 1];
      const double pivot = i < r ? top[i] : bottom[i];
      ratio = -coupling / pivot;
    }
    z[i] = ratio;
  }
  __syncwarp();
  if (lane < 2) {
    const int count = lane == 0 ? r : t - 1 - r;
    const int step = lane == 0 ? -1 : 1;
    double value = 1.0;
    double ratio = count > 0 ? z[r + step] : 1.0;
    for (int s = 1; s <= count; ++s) {
      const int i = r + s * step;
      value *= ratio;
      if (s < count) {
        ratio = z[i + step];
      }
      z[i] = value;
    }
  }
  __syncwarp();
  const double square = sum_by_warp<chunks>(t, [&](int k) {
    const double value = z[k];
    return value * value;
  });
  const double inverse = 1.0 / sqrt(square);
  for (int i = lane; i < t; i += kWarp) {
    z[i] *= inverse;
  }
  __syncwarp();
  return r;
}

// x (t entries in shared memory) <- Q x or Q^T x by the calling warp. Two reflectors at a time, so
// that their sums travel through the warp together:
//     (I - tau_2 v_2 v_2^T)(I - tau_1 v_1 v_1^T) x = x - f_1 v_1 - f_2 v_2,
//     f_1 = tau_1 v_1^T x,   f_2 = tau_2 (v_2^T x - f_1 v_2^T v_1).
template <int chunks>
__device__ __forceinline__ void apply_reflectors(
    const TridiagonalSpace& q, bool transposed, SharedPtr<double> x) {
  const int t = q.t;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double mine[chunks];
  IMMUNIZE_EXT_UNROLL
  for (int c = 0; c < chunks; ++c) {
    const int k = lane + kWarp * c;
    mine[c] = k < t ? x[k] : 0.0;
  }
  for (int step = 1; step < t; step += 2) {
    const int i = transposed ? t - step : step;
    const int next = transposed ? i - 1 : i + 1;
    const bool pair = step + 1 < t;
    const double tau = q.tau[i];
    const double next_tau = pair ? q.tau[next] : 0.0;
    double one[chunks];
    double two[chunks];
    double along_one = 0.0;
    double along_two = 0.0;
    double both = 0.0;
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < chunks; ++c) {
      const int k = lane + kWarp * c;
      one[c] = k < i ? q.a[i * q.stride + k] : 0.0;
      two[c] = pair && k < next ? q.a[next * q.stride + k] : 0.0;
      along_one = fma(one[c], mine[c], along_one);
      along_two = fma(two[c], mine[c], along_two);
      both = fma(one[c], two[c], both);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      along_one += __shfl_xor_sync(kFullMask, along_one, offset);
      along_two += __shfl_xor_sync(kFullMask, along_two, offset);
      both += __shfl_xor_sync(kFullMask, both, offset);
    }
    const double factor = tau * along_one;
    const double next_factor = next_tau * fma(-factor, both, along_two);
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < chunks; ++c) {
      mine[c] = fma(-next_factor, two[c], fma(-factor, one[c], mine[c]));
    }
  }
  __syncwarp();
  IMMUNIZE_EXT_UNROLL
  for (int c = 0; c < chunks; ++c) {
    const int k = lane + kWarp * c;
    if (k < t) {
      x[k] = mine[c];
    }
  }
  __syncwarp();
}

// b <- delta with (T - x) delta = b but for row r, delta orthogonal to z, by the calling warp.
// T without row and column r is well away from singular, exactly because z_r is not small, and
// definite for an extreme eigenvalue, so that its elimination needs no pivoting.
template <int chunks>
__device__ __forceinline__ void solve_beside(
    const TridiagonalSpace& q, int c, int r, SharedPtr<double> ratios, SharedPtr<double> b) {
  const int t = q.t;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const SharedPtr<double> top = q.pivots + 2 * c * t;
  const SharedPtr<double> bottom = top + t;
  const SharedPtr<double> z = q.z + c * t;
  // The two parts alike: i counts away from the ends towards r.
  for (int i = lane; i < t; i += kWarp) {
    double ratio = 0.0;
    if (i < r - 1 || i > r + 1) {
      const double coupling = q.e[i < r ? i : i - 1];
      const double pivot = i < r ? top[i] : bottom[i];
      ratio = coupling / pivot;
    }
    ratios[i] = ratio;
  }
  __syncwarp();
  const int step = lane == 0 ? 1 : -1;
  const int first = lane == 0 ? 0 : t - 1;
  const int count = lane == 0 ? r : t - 1 - r;
  if (lane < 2 && count > 0) {
    double value = b[first];
    for (int s = 1; s < count; ++s) {
      const int i = first + s * step;
      const double ratio = ratios[i - step];
      const double right = b[i];
      value = fma(-ratio, value, right);
      b[i] = value;
    }
  }
  __syncwarp();
  for (int i = lane; i < t; i += kWarp) {
    if (i != r) {
      const double pivot = i < r ? top[i] : bottom[i];
      b[i] /= pivot;
    } else {
      b[i] = 0.0;
    }
  }
  __syncwarp();
  if (lane < 2 && count > 0) {
    double value = b[first + (count - 1) * step];
    for (int s = count - 2; s >= 0; --s) {
      const int i = first + s * step;
      const double ratio = ratios[i];
      const double right = b[i];
      value = fma(-ratio, value, right);
      b[i] = value;
    }
  }
  __syncwarp();
  const double along = sum_by_warp<chunks>(t, [&](int k) {
    const double value = b[k];
    const double with = z[k];
    return value * with;
  });
  for (int i = lane; i < t; i += kWarp) {
    const double with = z[i];
    const double before = b[i];
    b[i] = fma(-along, with, before);
  }
  __syncwarp();
}

// b <- (T + shift)^-1 b for a positive definite T + shift, by the calling warp.
__device__ __forceinline__ void solve_shifted(
    const TridiagonalSpace& q, double shift, SharedPtr<double> pivots, SharedPtr<double> b) {
  if (threadIdx.x % kWarp == 0) {
    const double corner = q.d[0];
    double pivot = corner + shift;
    double value = b[0];
    pivots[0] = pivot;
    for (int i = 1; i < q.t; ++i) {
      const double coupling = q.e[i - 1];
      const double diagonal = q.d[i];
      const double right = b[i];
      const double ratio = coupling / pivot;
      pivot = fma(-ratio, coupling, diagonal + shift);
      value = fma(-ratio, value, right);
      pivots[i] = pivot;
      b[i] = value;
    }
    value /= pivot;
    b[q.t - 1] = value;
    for (int i = q.t - 2; i >= 0; --i) {
      const double coupling = q.e[i];
      const double right = b[i];
      const double divisor = pivots[i];
      value = fma(-coupling, value, right) / divisor;
      b[i] = value;
    }
  }
  __syncwarp();
}

// --- Measured on the matrix itself ---------------------------------------------------------------

// A number for either vector.
struct Two {
  double max, min;
};

__device__ __forceinline__ Two block_length(const Two& squares, SharedPtr<double> scratch) {
  const double max = block_sum(squares.max, scratch);
  const double min = block_sum(squares.min, scratch);
  return Two{sqrt(max), sqrt(min)};
}

// put(row, products of row with x_max, with x_min) for all rows of M; x (2 x t) in shared memory.
template <int chunks, typename T, typename Put>
__device__ __forceinline__ void long_products(
    const InputRows<T>& rows, std::int64_t m, int t, SharedPtr<const double> x, const Put& put) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  if (rows.is_contiguous()) {
    // Eight lanes a row.
    constexpr int kLanes = 8;
    const int sub = thread % kLanes;
    const int step = threads / kLanes;
    for (std::int64_t base = thread / kWarp * (kWarp / kLanes); base < m; base += step) {
      const std::int64_t row = base + thread % kWarp / kLanes;
      const int end = row < m ? t : 0;
      double to_max = 0.0;
      double to_min = 0.0;
      IMMUNIZE_EXT_UNROLL_BY(4)
      for (int j = sub; j < end; j += kLanes) {
        const double value = rows.at(row, j);
        const double x_max = x[j];
        const double x_min = x[t + j];
        to_max = fma(value, x_max, to_max);
        to_min = fma(value, x_min, to_min);
      }
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        to_max += __shfl_xor_sync(kFullMask, to_max, offset);
        to_min += __shfl_xor_sync(kFullMask, to_min, offset);
      }
      if (sub == 0 && row < m) {
        put(row, to_max, to_min);
      }
    }
    return;
  }
  // A thread takes several rows at a time, so that many loads are under way.
  constexpr int kRows = chunks == 1 ? 2 : 4;
  for (std::int64_t base = thread; base < m; base += std::int64_t{kRows} * threads) {
    double to_max[kRows] = {};
    double to_min[kRows] = {};
    IMMUNIZE_EXT_UNROLL_BY(kRows)
    for (int j = 0; j < t; ++j) {
      const double x_max = x[j];
      const double x_min = x[t + j];
      IMMUNIZE_EXT_UNROLL
      for (int c = 0; c < kRows; ++c) {
        const std::int64_t row = base + std::int64_t{c} * threads;
        const double value = row < m ? rows.at(row, j) : 0.0;
        to_max[c] = fma(value, x_max, to_max[c]);
        to_min[c] = fma(value, x_min, to_min[c]);
      }
    }
    IMMUNIZE_EXT_UNROLL
    for (int c = 0; c < kRows; ++c) {
      const std::int64_t row = base + std::int64_t{c} * threads;
      if (row < m) {
        put(row, to_max[c], to_min[c]);
      }
    }
  }
}

// w_c = M u_c or, where it `corrects`, w_c -= M r_c. Returns |w_c|, and |M r_c| in steps.
template <int chunks, typename T>
__device__ __forceinline__ Two measure(
    const InputRows<T>& rows,
    std::int64_t m,
    const TridiagonalSpace& q,
    bool corrects,
    SharedPtr<double> w_max,
    SharedPtr<double> w_min,
    Two& steps) {
  Two step_squares{0.0, 0.0};
  Two squares{0.0, 0.0};
  const auto put = [&](std::int64_t row, double max, double min) {
    if (corrects) {
      step_squares.max = fma(max, max, step_squares.max);
      step_squares.min = fma(min, min, step_squares.min);
      const double old_max = w_max[row];
      const double old_min = w_min[row];
      max = old_max - max;
      min = old_min - min;
    }
    w_max[row] = max;
    w_min[row] = min;
    squares.max = fma(max, max, squares.max);
    squares.min = fma(min, min, squares.min);
  };
  long_products<chunks>(rows, m, q.t, corrects ? q.r : q.u, put);
  const Two lengths = block_length(squares, q.scratch);
  if (corrects) {
    steps = block_length(step_squares, q.scratch);
  }
  return lengths;
}

// r_c = M^T w_c / sigma_c - sigma_c u_c for both. Returns |r_c|.
template <int chunks, typename T>
__device__ __forceinline__ Two residuals(
    const InputRows<T>& rows,
    std::int64_t m,
    const TridiagonalSpace& q,
    const Two& lengths,
    const Two& sigma,
    SharedPtr<const double> w_max,
    SharedPtr<const double> w_min) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int t = q.t;
  const double inverse_max = lengths.max > 0.0 ? 1.0 / lengths.max : 0.0;
  const double inverse_min = lengths.min > 0.0 ? 1.0 / lengths.min : 0.0;
  const auto put = [&](int j, double to_max, double to_min) {
    const double u_max = q.u[j];
    const double u_min = q.u[t + j];
    q.r[j] = fma(-sigma.max, u_max, to_max * inverse_max);
    q.r[t + j] = fma(-sigma.min, u_min, to_min * inverse_min);
  };
  if (rows.is_contiguous()) {
    // A thread takes a column of every groups-th row.
    const int groups = threads / t;
    const int group = thread / t;
    const int j = thread - group * t;
    double to_max = 0.0;
    double to_min = 0.0;
    if (group < groups) {
      IMMUNIZE_EXT_UNROLL_BY(4)
      for (std::int64_t row = group; row < m; row += groups) {
        const double value = rows.at(row, j);
        const double max = w_max[row];
        const double min = w_min[row];
        to_max = fma(value, max, to_max);
        to_min = fma(value, min, to_min);
      }
    }
    q.partial[thread] = to_max;
    q.partial[threads + thread] = to_min;
    __syncthreads();
    if (thread < t) {
      for (int g = 1; g < groups; ++g) {
        const double max = q.partial[g * t + j];
        const double min = q.partial[threads + g * t + j];
        to_max += max;
        to_min += min;
      }
      put(j, to_max, to_min);
    }
  } else {
    // A warp takes several columns, which lie along memory.
    constexpr int kColumns = chunks == 1 ? 2 : 4;
    const int lane = thread % kWarp;
    for (int base = thread / kWarp * kColumns; base < t; base += threads / kWarp * kColumns) {
      double to_max[kColumns] = {};
      double to_min[kColumns] = {};
      IMMUNIZE_EXT_UNROLL_BY(4)
      for (std::int64_t row = lane; row < m; row += kWarp) {
        const double max = w_max[row];
        const double min = w_min[row];
        IMMUNIZE_EXT_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const double value = base + c < t ? rows.at(row, base + c) : 0.0;
          to_max[c] = fma(value, max, to_max[c]);
          to_min[c] = fma(value, min, to_min[c]);
        }
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        IMMUNIZE_EXT_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          to_max[c] += __shfl_xor_sync(kFullMask, to_max[c], offset);
          to_min[c] += __shfl_xor_sync(kFullMask, to_min[c], offset);
        }
      }
      IMMUNIZE_EXT_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (lane == c && base + c < t) {
          put(base + c, to_max[c], to_min[c]);
        }
      }
    }
  }
  __syncthreads();
  const auto length = [&](SharedPtr<const double> r) {
    return sqrt(sum_by_warp<chunks>(t, [&](int k) {
      const double value = r[k];
      return value * value;
    }));
  };
  return Two{length(q.r), length(q.r + t)};
}

// What was found, in scaled units; `proven` as above.
struct Triplets {
  double largest, smallest;
  bool proven;
};

// The extremes of M from its packed Gram matrix, which is kept. short_* (t) and long_* (m) get the
// vectors, which mean nothing unless proven; those of a missing smallest value are zero. Calls
// put_counts(rank, multiplicity_max, multiplicity_min) as soon as they are known.
template <typename Shape, typename T, typename PutCounts>
__device__ __forceinline__ Triplets extremes_by_tridiagonal(
    const InputRows<T>& rows,
    std::int64_t m,
    const TridiagonalSpace& q,
    SharedPtr<const double> gram,
    const Policy& policy,
    SharedPtr<double> long_max,
    SharedPtr<double> long_min,
    SharedPtr<double> short_max,
    SharedPtr<double> short_min,
    const PutCounts& put_counts) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp;
  const int warps = threads / kWarp;
  const int lane = thread % kWarp;
  const int t = q.t;
  constexpr int chunks = Shape::chunks;
  Triplets out{};
  tridiagonalise<Shape>(q, gram);
  double norm = 0.0;
  for (int i = lane; i < t; i += kWarp) {
    const double diagonal = q.d[i];
    const double above = i > 0 ? q.e[i - 1] : 0.0;
    const double below = i + 1 < t ? q.e[i] : 0.0;
    norm = fmax(norm, fabs(diagonal) + fabs(above) + fabs(below));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    norm = fmax(norm, __shfl_xor_sync(kFullMask, norm, offset));
  }
  norm *= 1.0 + 8.0 * kEps;
  if (!(norm > 0.0)) {
    return out;  // the zero matrix
  }

  // Eigenvalues and counts.
  const double terms = fmax(static_cast<double>(larger(t, 16)), sqrt(static_cast<double>(m) / 8.0));
  Ends ends{};
  Counts counts{};
  int missing = 0;
  double noise = 0.0;
  double sigma_max = 0.0;
  for (bool first = true;; first = false) {
    ends = find_ends(q, norm, t - 1, missing);
    noise = 4.0 * terms * kEps * ends.top;
    sigma_max = sqrt(fmax(ends.top, 0.0));
    const double rank_threshold = policy.rank_rtol * policy.rank_rtol * ends.top;
    const double keeps = 1.0 - policy.cluster_rtol;
    const double edge = sqrt(fmax(ends.bottom, 0.0)) + policy.cluster_rtol * sigma_max;
    double point = rank_threshold;
    point = thread >= 2 ? ends.top * keeps * keeps : point;
    point = thread >= 4 ? edge * edge : point;
    const double margin = thread >= 4 ? 2.0 * noise : noise;
    counts = count_at(q, thread % 2 == 0 ? point - margin : point + margin);
    bool known = ends.found && ends.top > 0.0;
    IMMUNIZE_EXT_UNROLL
    for (int s = 0; s < 6; ++s) {
      known = known && counts.below[s] >= 0;
    }
    if (!known) {
      return out;
    }
    if (counts.below[1] == 0 || !first) {
      break;
    }
    missing = counts.below[1];
    if (!(rank_threshold > 4.0 * noise) || counts.below[0] != missing || missing >= t) {
      return out;
    }
  }
  const int most = larger(1, t - counts.below[2]);
  if (most != larger(1, t - counts.below[3])) {
    return out;
  }
  const int rank = t - missing;
  const bool has_min = !(policy.full_rank && rank < policy.full_side);
  const int least = larger(1, counts.below[5] - missing);
  if (has_min && least != larger(1, counts.below[4] - missing)) {
    return out;
  }
  put_counts(rank, smaller(most, rank), has_min ? least : policy.full_side - rank);

  // Vectors.
  factor_twisted(q, ends.top, ends.bottom, 1e-30 * norm);
  int twist_max = 0;
  int twist_min = 0;
  for (int c = warp; c < 2; c += warps) {
    const int r = twisted_vector<chunks>(q, c, c == 0 ? ends.top : ends.bottom);
    twist_max = c == 0 ? r : twist_max;
    twist_min = c == 1 ? r : twist_min;
    const bool wanted = c == 0 || has_min;
    for (int k = lane; k < t; k += kWarp) {
      const double value = q.z[c * t + k];
      q.u[c * t + k] = wanted ? value : 0.0;
    }
    __syncwarp();
  }

  // u from T; then, in turn, Newton's step for u, the correction of v, and u measured once more.
  const double tolerance =
      4.0 * sqrt(static_cast<double>(m) + static_cast<double>(t)) * kEps * sigma_max;
  Two lengths{};
  Two sigma{};
  bool max_passes = false;
  bool min_passes = !has_min;
  IMMUNIZE_EXT_UNROLL_BY(1)
  for (int step = 0;; ++step) {
    const bool corrects = step % 3 == 2;
    const bool again = step > 0 && step % 3 == 0;  // v did not help: the residual is that of u
    IMMUNIZE_EXT_UNROLL_BY(1)
    for (int c = warp; c < 2 && !again; c += warps) {
      const SharedPtr<double> u = q.u + c * t;
      const SharedPtr<double> r = q.r + c * t;
      const double lambda = c == 0 ? ends.top : ends.bottom;
      const bool idle = c == 0 ? max_passes : min_passes;
      if (step > 0) {
        const double length = c == 0 ? sigma.max : sigma.min;
        const double factor = idle ? 0.0 : corrects ? length : -length;
        for (int k = lane; k < t; k += kWarp) {
          r[k] *= factor;
        }
        __syncwarp();
      }
      if (idle) {
        continue;
      }
      IMMUNIZE_EXT_UNROLL_BY(1)
      for (int side = step > 0 ? 0 : 1; side < 2; ++side) {
        if (side == 1 && corrects) {
          solve_shifted(q, lambda, q.partial + c * threads, r);
        } else if (side == 1 && step > 0) {
          solve_beside<chunks>(q, c, c == 0 ? twist_max : twist_min, q.partial + c * threads, r);
        }
        apply_reflectors<chunks>(q, side == 0, step > 0 ? r : u);
      }
      if (step > 0 && !corrects) {
        for (int k = lane; k < t; k += kWarp) {
          const double change = r[k];
          u[k] += change;
        }
        __syncwarp();
        const double square = sum_by_warp<chunks>(t, [&](int k) {
          const double value = u[k];
          return value * value;
        });
        const double inverse = 1.0 / sqrt(square);
        for (int k = lane; k < t; k += kWarp) {
          u[k] *= inverse;
        }
      }
    }
    __syncthreads();
    Two change{0.0, 0.0};
    lengths = measure<chunks>(rows, m, q, corrects, long_max, long_min, change);
    sigma = corrects ? sigma : lengths;
    const Two error = residuals<chunks>(rows, m, q, lengths, sigma, long_max, long_min);
    // Not >, or a NaN would pass.
    max_passes =
        fmax(error.max, change.max) <= tolerance && fabs(sigma.max * sigma.max - ends.top) <= noise;
    min_passes = !has_min || (fmax(error.min, change.min) <= tolerance &&
                              fabs(sigma.min * sigma.min - ends.bottom) <= noise);
    if (max_passes && min_passes) {
      break;
    }
    if (step == 3 * kRefinements - 1) {
      return out;
    }
    __syncthreads();
  }
  const double inverse_max = 1.0 / lengths.max;
  const double inverse_min = lengths.min > 0.0 ? 1.0 / lengths.min : 0.0;
  for (std::int64_t row = thread; row < m; row += threads) {
    long_max[row] *= inverse_max;
    long_min[row] *= inverse_min;
  }
  for (int j = thread; j < t; j += threads) {
    const double to_max = q.u[j];
    const double to_min = q.u[t + j];
    short_max[j] = to_max;
    short_min[j] = to_min;
  }
  out.largest = sigma.max;
  out.smallest = has_min ? fmin(sigma.min, sigma.max) : 0.0;
  out.proven = true;
  return out;
}

}  // namespace immunize_ext::spectrum
