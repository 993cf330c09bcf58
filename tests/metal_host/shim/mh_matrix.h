// 8x8 matrices whose elements are spread over the 32 lanes of a simdgroup, two to a lane. Apple does
// not say which lane has which element; this is the map that MLX's own kernels rely on.
#pragma once

#include "mh_simd.h"

namespace metal {

template <typename T, int Cols, int Rows>
struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "only 8x8 matrices exist");
  static_assert(is_floating_point_v<T>, "float, half or bfloat");
  simdgroup_matrix() = default;
  // A diagonal matrix.
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; ++i) {
      elements.e[i] = row() == column() + i ? diagonal : static_cast<T>(0.0f);
    }
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }

  static int row() { return (mh_detail::lane() / 4 & 4) + mh_detail::lane() / 2 % 4; }
  static int column() { return (mh_detail::lane() / 4 & 2) * 2 + mh_detail::lane() % 2 * 2; }

 private:
  vec<T, 2> elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int Cols, int Rows>
inline simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Cols, Rows> result;
  result.thread_elements() = vec<T, 2>(value);
  return result;
}

namespace mh_detail {

template <typename D, typename A, typename B, typename C>
struct Product8x8 {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;

  // Products and sums in float, rounded once.
  static void combine(const unsigned char* in, unsigned char* out, unsigned active) {
    float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(active >> lane & 1)) mh_inactive_lane(__builtin_ctz(active), lane);
      if (!(active >> lane & 1)) continue;
      const Product8x8 mine = take<Product8x8>(in, lane);
      const int row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
      for (int i = 0; i < 2; ++i) {
        a[row][column + i] = static_cast<float>(mine.a.e[i]);
        b[row][column + i] = static_cast<float>(mine.b.e[i]);
        c[row][column + i] = static_cast<float>(mine.c.e[i]);
      }
    }
    for (int row = 0; row < 8; ++row) {
      for (int k = 0; k < 8; ++k) {
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(active >> lane & 1)) continue;
      const int row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
      put(out, lane, vec<D, 2>(static_cast<D>(c[row][column]), static_cast<D>(c[row][column + 1])));
    }
  }
};

}  // namespace mh_detail

template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c,
    MH_SITE) {
  using Product = mh_detail::Product8x8<D, A, B, C>;
  const Product mine{a.thread_elements(), b.thread_elements(), c.thread_elements()};
  d.thread_elements() = mh_detail::collective<vec<D, 2>>(mine, &Product::combine, file, line);
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    MH_SITE) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(static_cast<D>(0.0f));
  simdgroup_multiply_accumulate(d, a, b, zero, file, line);
}

// Every lane moves its own two elements; that all lanes come here is checked by the rendezvous.
template <typename T>
inline void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& m,
    const T* source,
    ulong elements_per_row = 8,
    ulong2 origin = ulong2(0, 0),
    bool transpose = false,
    MH_SITE) {
  mh_detail::active_mask(file, line);
  for (int i = 0; i < 2; ++i) {
    const ulong row = origin.y + (transpose ? m.column() + i : m.row());
    const ulong column = origin.x + (transpose ? m.row() : m.column() + i);
    m.thread_elements().e[i] = source[row * elements_per_row + column];
  }
}
template <typename T>
inline void simdgroup_store(
    simdgroup_matrix<T, 8, 8> m,
    T* target,
    ulong elements_per_row = 8,
    ulong2 origin = ulong2(0, 0),
    bool transpose = false,
    MH_SITE) {
  mh_detail::active_mask(file, line);
  for (int i = 0; i < 2; ++i) {
    const ulong row = origin.y + (transpose ? m.column() + i : m.row());
    const ulong column = origin.x + (transpose ? m.row() : m.column() + i);
    target[row * elements_per_row + column] = m.thread_elements().e[i];
  }
}

}  // namespace metal
