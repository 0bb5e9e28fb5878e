// Thresholds, elementwise over a dense tensor in storage order, at one instruction set level.
//
// Runs are worked on in pieces that stay in the nearest cache. Values of half precision are widened to float before and
// rounded after, so that all loops are of float or double. A piece of a plane has one threshold and one bias; rows of
// channels (channels_last) have one for each element of the row. Backward writes the gradient of the input and adds up
// those of threshold and bias in the same pass: in accumulate_t<T> over a piece, in double beyond.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

constexpr int64_t piece_elements = 1024;
// Where terms are products with a smooth activation, so many are added up before they go to double (for an error that
// is no larger than that of PyTorch's sum by halves).
constexpr int64_t smooth_sum = 256;
constexpr int64_t sum_lanes = 16;  // independent sums, so that the compiler may keep them in one vector

// Elements [at, at + size) in storage order: of one channel, or, if row is not 0, of channels from this one on, which
// come again after `row` elements.
struct Piece {
  int64_t at, size, channel, row;
};

// Calls f(task, piece) for the pieces of tasks, in order: whole rows of channels where a piece has room for one.
template <typename F>
DSC_HOST_DEVICE void for_each_piece(const Layout& layout, int64_t begin, int64_t end, const F& f) {
  const int64_t row = layout.inner == 1 ? layout.channels : 0;
  const int64_t most = row > 0 && row <= piece_elements ? piece_elements / row * row : piece_elements;
  for (int64_t task = begin; task < end; ++task) {
    const Run run = run_at(layout, task);
    for (int64_t at = run.begin, size; at < run.end; at += size) {
      const int64_t channel = row > 0 ? (at - run.begin) % row : run.channel;
      const int64_t left = (row > piece_elements ? at + row - channel : run.end) - at;
      size = left < most ? left : most;
      f(task, Piece{at, size, channel, row > size ? size : row});
    }
  }
}

// Values of type T as accumulate_t<T>: they themselves, or a copy of a piece; null stays null.
template <typename T>
class Widened {
 public:
  using A = accumulate_t<T>;
  Widened(const T* in, const Piece& piece) {
    if constexpr (same) {
      values_ = in ? in + piece.at : nullptr;
    } else if (in) {
      widen(in + piece.at, piece.size, copy_);
      values_ = copy_;
    }
  }
  const A* get() const { return values_; }

 private:
  static constexpr bool same = sizeof(T) == sizeof(A);
  const A* values_ = nullptr;
  A copy_[same ? 1 : piece_elements];
};

// Where a piece's results of type accumulate_t<T> are written: their places, or memory from which finish() rounds them.
template <typename T>
class Rounded {
 public:
  using A = accumulate_t<T>;
  Rounded(T* out, const Piece& piece) : out_(out + piece.at), size_(piece.size) {}
  A* get() {
    if constexpr (same)
      return out_;
    else
      return copy_;
  }
  void finish() const {
    if constexpr (!same) narrow(copy_, size_, out_);
  }

 private:
  static constexpr bool same = sizeof(T) == sizeof(A);
  T* out_;
  int64_t size_;
  A copy_[same ? 1 : piece_elements];
};

// out[i] = f(i, theta, bias) for the elements of a piece. Thresholds and biases are read before the loop over a plane,
// or lie in rows of their own, and `out` shares no memory with what f reads: all loops vectorise.
template <typename A, typename F>
DSC_HOST_DEVICE void fill(const Piece& piece, const A* __restrict theta, int64_t theta_stride, const A* __restrict bias,
                          A* __restrict out, const F& f) {
  theta += piece.channel * theta_stride;
  if (bias) bias += piece.channel;
  if (piece.row == 0) {
    const A channel_theta = *theta, channel_bias = bias ? *bias : A(0);
    for (int64_t i = 0; i < piece.size; ++i) out[i] = f(i, channel_theta, channel_bias);
  } else {
    for (int64_t row = 0; row < piece.size; row += piece.row)
      for (int64_t c = 0; c < piece.row; ++c) out[row + c] = f(row + c, theta[c * theta_stride], bias ? bias[c] : A(0));
  }
}

// What is of a piece is not inlined, so that the types of tensors share it.
template <bool one_sided, typename A>
__attribute__((noinline)) void soft_threshold_piece(const Piece& piece, const A* u, const A* residual, const A* theta,
                                                    int64_t theta_stride, const A* bias, A* codes) {
  if (residual)
    fill(piece, theta, theta_stride, bias, codes, [=](int64_t i, A channel_theta, A channel_bias) {
      return soft_threshold<one_sided>(u[i] + channel_bias + residual[i], channel_theta);
    });
  else
    fill(piece, theta, theta_stride, bias, codes, [=](int64_t i, A channel_theta, A channel_bias) {
      return soft_threshold<one_sided>(u[i] + channel_bias, channel_theta);
    });
}

template <typename T>
void soft_threshold_tasks(const SoftThreshold<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const auto apply = p.one_sided ? soft_threshold_piece<true, A> : soft_threshold_piece<false, A>;
  for_each_piece(p.layout, begin, end, [&](int64_t, const Piece& piece) {
    const Widened<T> u(p.u, piece), residual(p.residual, piece);
    Rounded<T> codes(p.codes, piece);
    apply(piece, u.get(), residual.get(), p.theta, p.theta_stride, p.bias, codes.get());
    codes.finish();
  });
}

// Calls vector(i, v) for whole vectors of sum_lanes elements, of which v is the index, and one(i, lane) for what is
// left.
template <typename A, typename OfVector, typename OfOne>
DSC_HOST_DEVICE void for_each_lane(int64_t size, const OfVector& vector, const OfOne& one) {
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + sum_lanes <= size; i += sum_lanes)
#pragma GCC unroll 8
    for (int v = 0; v < sum_lanes / lanes; ++v) vector(i + v * lanes, v);
  for (; i < size; ++i) one(i, i % sum_lanes);
}

// sum_lanes sums.
template <typename A>
union LaneSums {
  Lanes<A> v[sum_lanes / Vector<A>::lanes];
  A lane[sum_lanes];
  double total() const {
    double sum = 0;
    for (int64_t i = 0; i < sum_lanes; ++i) sum += lane[i];
    return sum;
  }
};

// Adds to the sums of a piece's channels.
template <typename A>
__attribute__((noinline)) void soft_threshold_backward_piece(const Piece& piece, const A* grad, const A* codes,
                                                             A* grad_u, double* theta_sums, double* bias_sums) {
  using V = Lanes<A>;
  if (piece.row > 0) {
    for (int64_t i = 0; i < piece.size; ++i) grad_u[i] = soft_threshold_grad_u(codes[i], grad[i]);
    for (int64_t row = 0; row < piece.size; row += piece.row)
      for (int64_t c = 0; c < piece.row; ++c) {
        const A code = codes[row + c], g = grad[row + c];
        theta_sums[c] += soft_threshold_grad_theta(code, g);
        bias_sums[c] += soft_threshold_grad_u(code, g);
      }
    return;
  }
  LaneSums<A> theta = {}, bias = {};
  for_each_lane<A>(
      piece.size,
      [&](int64_t i, int v) {
        const V code = lanes_at(codes + i), through = code == A(0) ? V{} : lanes_at(grad + i);
        *reinterpret_cast<V*>(grad_u + i) = through;
        bias.v[v] += through;
        theta.v[v] += code < A(0) ? through : -through;
      },
      [&](int64_t i, int64_t lane) {
        const A through = soft_threshold_grad_u(codes[i], grad[i]);
        grad_u[i] = through;
        bias.lane[lane] += through;
        theta.lane[lane] += soft_threshold_grad_theta(codes[i], grad[i]);
      });
  *theta_sums += theta.total();
  *bias_sums += bias.total();
}

template <typename T>
void soft_threshold_backward_tasks(const SoftThresholdBackward<T>& p, int64_t begin, int64_t end) {
  const int64_t width = p.layout.inner == 1 ? p.layout.channels : 1;
  for_each_piece(p.layout, begin, end, [&](int64_t task, const Piece& piece) {
    const Widened<T> grad(p.grad, piece), codes(p.codes, piece);
    Rounded<T> grad_u(p.grad_u, piece);
    double* const sums = p.sums + task * 2 * width + (piece.row > 0 ? piece.channel : 0);
    soft_threshold_backward_piece(piece, grad.get(), codes.get(), grad_u.get(), sums, sums + width);
    grad_u.finish();
  });
}

template <Activation activation, bool one_sided, typename A>
void shrink_piece(const Piece& piece, const A* u, const A* theta, int64_t theta_stride, A* out) {
  fill(piece, theta, theta_stride, static_cast<const A*>(nullptr), out,
       [=](int64_t i, A channel_theta, A) { return shrink<activation, one_sided>(u[i], channel_theta); });
}

// Adds to the sums of a piece's channels.
template <Activation activation, bool one_sided, typename A>
void shrink_backward_piece(const Piece& piece, const A* grad, const A* u, const A* __restrict theta,
                           int64_t theta_stride, A* __restrict grad_u, double* __restrict sums) {
  // Writes the gradient of element i and adds its part in that of theta.
  const auto element = [=](int64_t i, A channel_theta, auto& sum) {
    const ShrinkDerivatives<activation, one_sided, A> derivatives(u[i], channel_theta);
    grad_u[i] = grad[i] * derivatives.of_u;
    sum += grad[i] * derivatives.of_theta;
  };
  theta += piece.channel * theta_stride;
  if (piece.row > 0) {
    for (int64_t row = 0; row < piece.size; row += piece.row)
      for (int64_t c = 0; c < piece.row; ++c) element(row + c, theta[c * theta_stride], sums[c]);
    return;
  }
  for (int64_t i = 0; i < piece.size;) {
    const int64_t stop = i + smooth_sum < piece.size ? i + smooth_sum : piece.size;
    LaneSums<A> of_theta = {};
    for (; i + sum_lanes <= stop; i += sum_lanes)
      for (int64_t lane = 0; lane < sum_lanes; ++lane) element(i + lane, *theta, of_theta.lane[lane]);
    for (; i < stop; ++i) element(i, *theta, of_theta.lane[i % sum_lanes]);
    *sums += of_theta.total();
  }
}

// The two for an activation and a side that are known only at run time.
template <typename A>
struct ShrinkPieces {
  void (*forward)(const Piece& piece, const A* u, const A* theta, int64_t theta_stride, A* out);
  void (*backward)(const Piece& piece, const A* grad, const A* u, const A* theta, int64_t theta_stride, A* grad_u,
                   double* sums);
};

template <Activation activation, typename A>
ShrinkPieces<A> shrink_pieces_of(bool one_sided) {
  if (one_sided) return {shrink_piece<activation, true, A>, shrink_backward_piece<activation, true, A>};
  return {shrink_piece<activation, false, A>, shrink_backward_piece<activation, false, A>};
}

template <typename A>
ShrinkPieces<A> shrink_pieces(Activation activation, bool one_sided) {
  switch (activation) {
    case Activation::relu:
      return shrink_pieces_of<Activation::relu, A>(one_sided);
    case Activation::leaky_relu:
      return shrink_pieces_of<Activation::leaky_relu, A>(one_sided);
    case Activation::elu:
      return shrink_pieces_of<Activation::elu, A>(one_sided);
    case Activation::silu:
      return shrink_pieces_of<Activation::silu, A>(one_sided);
    case Activation::mish:
      return shrink_pieces_of<Activation::mish, A>(one_sided);
    default:
      return shrink_pieces_of<Activation::gelu, A>(one_sided);
  }
}

template <typename T>
void shrink_tasks(const Shrink<T>& p, int64_t begin, int64_t end) {
  const auto apply = shrink_pieces<accumulate_t<T>>(p.activation, p.one_sided).forward;
  for_each_piece(p.layout, begin, end, [&](int64_t, const Piece& piece) {
    const Widened<T> u(p.u, piece);
    Rounded<T> out(p.out, piece);
    apply(piece, u.get(), p.theta, p.theta_stride, out.get());
    out.finish();
  });
}

template <typename T>
void shrink_backward_tasks(const ShrinkBackward<T>& p, int64_t begin, int64_t end) {
  const auto apply = shrink_pieces<accumulate_t<T>>(p.activation, p.one_sided).backward;
  const int64_t width = p.layout.inner == 1 ? p.layout.channels : 1;
  for_each_piece(p.layout, begin, end, [&](int64_t task, const Piece& piece) {
    const Widened<T> grad(p.grad, piece), u(p.u, piece);
    Rounded<T> grad_u(p.grad_u, piece);
    double* const sums = p.sums + task * width + (piece.row > 0 ? piece.channel : 0);
    apply(piece, grad.get(), u.get(), p.theta, p.theta_stride, grad_u.get(), sums);
    grad_u.finish();
  });
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
