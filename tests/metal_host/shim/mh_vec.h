// Vectors of two, three and four elements, component-wise.
#pragma once

#include "mh_types.h"

namespace metal {

template <typename T, int N>
struct vec;

namespace mh_detail {

template <typename T>
struct is_vec : false_type {};
template <typename T, int N>
struct is_vec<vec<T, N>> : true_type {};

// The view of a vector that `v.zyx` names. Reads give a vector; writes go to the elements.
template <typename T, int Stored, int... I>
struct Swizzle {
  T e[Stored];
  Swizzle() = default;
  static constexpr int kCount = sizeof...(I);
  using Vec = vec<T, kCount>;
  operator Vec() const {
    const int from[] = {I...};
    Vec result;
    for (int i = 0; i < kCount; ++i) result.e[i] = e[from[i]];
    return result;
  }
  Swizzle& operator=(const Vec& value) {
    const int to[] = {I...};
    for (int i = 0; i < kCount; ++i) e[to[i]] = value.e[i];
    return *this;
  }
  Swizzle(const Swizzle&) = delete;
  Swizzle& operator=(const Swizzle& other) { return *this = Vec(other); }
  Swizzle& operator+=(const Vec& value) { return *this = Vec(*this) + value; }
  Swizzle& operator-=(const Vec& value) { return *this = Vec(*this) - value; }
  Swizzle& operator*=(const Vec& value) { return *this = Vec(*this) * value; }
};

}  // namespace mh_detail

// Copied element by element: a copy of 12 bytes at once the checks would not see.
#define MH_VEC_COMMON(N)                                             \
  vec() = default;                                                   \
  vec(const vec& other) {                                            \
    for (int i = 0; i < N; ++i) e[i] = other.e[i];                   \
  }                                                                  \
  vec& operator=(const vec& other) {                                 \
    for (int i = 0; i < N; ++i) e[i] = other.e[i];                   \
    return *this;                                                    \
  }                                                                  \
  vec(T value) {                                                     \
    for (int i = 0; i < N; ++i) e[i] = value;                        \
  }                                                                  \
  template <typename U>                                              \
  explicit vec(const vec<U, N>& other) {                             \
    for (int i = 0; i < N; ++i) e[i] = static_cast<T>(other.e[i]);   \
  }                                                                  \
  template <typename U, int S, int... I, enable_if_t<!is_same_v<U, T>, int> = 0> \
  explicit vec(const mh_detail::Swizzle<U, S, I...>& other)          \
      : vec(static_cast<vec<U, N>>(other)) {}                        \
  T& operator[](int i) { return e[i]; }                              \
  const T& operator[](int i) const { return e[i]; }

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    mh_detail::Swizzle<T, 2, 0, 1> xy;
    mh_detail::Swizzle<T, 2, 1, 0> yx;
    mh_detail::Swizzle<T, 2, 0, 0> xx;
    mh_detail::Swizzle<T, 2, 1, 1> yy;
  };
  MH_VEC_COMMON(2)
  vec(T a, T b) : e{a, b} {}
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    mh_detail::Swizzle<T, 3, 0, 1> xy;
    mh_detail::Swizzle<T, 3, 1, 2> yz;
    mh_detail::Swizzle<T, 3, 0, 2> xz;
    mh_detail::Swizzle<T, 3, 0, 1, 2> xyz;
    mh_detail::Swizzle<T, 3, 2, 1, 0> zyx;
  };
  MH_VEC_COMMON(3)
  vec(T a, T b, T c) : e{a, b, c} {}
  vec(const vec<T, 2>& ab, T c) : e{ab.e[0], ab.e[1], c} {}
  vec(T a, const vec<T, 2>& bc) : e{a, bc.e[0], bc.e[1]} {}
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    mh_detail::Swizzle<T, 4, 0, 1> xy;
    mh_detail::Swizzle<T, 4, 1, 2> yz;
    mh_detail::Swizzle<T, 4, 2, 3> zw;
    mh_detail::Swizzle<T, 4, 0, 2> xz;
    mh_detail::Swizzle<T, 4, 1, 3> yw;
    mh_detail::Swizzle<T, 4, 0, 1> lo;
    mh_detail::Swizzle<T, 4, 2, 3> hi;
    mh_detail::Swizzle<T, 4, 0, 2> even;
    mh_detail::Swizzle<T, 4, 1, 3> odd;
    mh_detail::Swizzle<T, 4, 0, 1, 2> xyz;
    mh_detail::Swizzle<T, 4, 1, 2, 3> yzw;
    mh_detail::Swizzle<T, 4, 0, 1, 2, 3> xyzw;
    mh_detail::Swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
  MH_VEC_COMMON(4)
  vec(T p, T q, T r, T s) : e{p, q, r, s} {}
  vec(const vec<T, 2>& pq, const vec<T, 2>& rs) : e{pq.e[0], pq.e[1], rs.e[0], rs.e[1]} {}
  vec(const vec<T, 2>& pq, T r, T s) : e{pq.e[0], pq.e[1], r, s} {}
  vec(T p, T q, const vec<T, 2>& rs) : e{p, q, rs.e[0], rs.e[1]} {}
  vec(const vec<T, 3>& pqr, T s) : e{pqr.e[0], pqr.e[1], pqr.e[2], s} {}
  vec(T p, const vec<T, 3>& qrs) : e{p, qrs.e[0], qrs.e[1], qrs.e[2]} {}
};
#undef MH_VEC_COMMON

// Elements in memory without the alignment of a vector.
template <typename T, int N>
struct packed_vec {
  T e[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& value) {
    for (int i = 0; i < N; ++i) e[i] = value.e[i];
  }
  operator vec<T, N>() const {
    vec<T, N> result;
    for (int i = 0; i < N; ++i) result.e[i] = e[i];
    return result;
  }
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

template <typename S>
using mh_scalar = enable_if_t<is_arithmetic_v<S>>;

#define MH_VEC_OP(op)                                                             \
  template <typename T, int N>                                                    \
  inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {          \
    vec<T, N> result;                                                             \
    for (int i = 0; i < N; ++i) result.e[i] = static_cast<T>(a.e[i] op b.e[i]);   \
    return result;                                                                \
  }                                                                               \
  template <typename T, int N, typename S, typename = mh_scalar<S>>               \
  inline vec<T, N> operator op(const vec<T, N>& a, S b) {                         \
    return a op vec<T, N>(static_cast<T>(b));                                     \
  }                                                                               \
  template <typename T, int N, typename S, typename = mh_scalar<S>>               \
  inline vec<T, N> operator op(S a, const vec<T, N>& b) {                         \
    return vec<T, N>(static_cast<T>(a)) op b;                                     \
  }                                                                               \
  template <typename T, int N>                                                    \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) {            \
    return a = a op b;                                                            \
  }                                                                               \
  template <typename T, int N, typename S, typename = mh_scalar<S>>               \
  inline vec<T, N>& operator op##=(vec<T, N>& a, S b) {                           \
    return a = a op b;                                                            \
  }
// A swizzle in an expression is the vector it gives.
#define MH_SWIZZLE_OP(op)                                                                        \
  template <typename T, int S, int... I, typename B>                                             \
  inline auto operator op(const mh_detail::Swizzle<T, S, I...>& a, const B& b)                   \
      ->decltype(vec<T, sizeof...(I)>() op b) {                                                  \
    return vec<T, sizeof...(I)>(a) op b;                                                         \
  }                                                                                              \
  template <typename A, typename T, int S, int... I>                                             \
  inline auto operator op(const A& a, const mh_detail::Swizzle<T, S, I...>& b)                   \
      ->decltype(a op vec<T, sizeof...(I)>()) {                                                  \
    return a op vec<T, sizeof...(I)>(b);                                                         \
  }                                                                                              \
  template <typename T, int S, int... I, int R, int... J>                                        \
  inline vec<T, sizeof...(I)> operator op(                                                       \
      const mh_detail::Swizzle<T, S, I...>& a, const mh_detail::Swizzle<T, R, J...>& b) {        \
    return vec<T, sizeof...(I)>(a) op vec<T, sizeof...(J)>(b);                                   \
  }
MH_VEC_OP(+)
MH_VEC_OP(-)
MH_VEC_OP(*)
MH_VEC_OP(/)
MH_VEC_OP(%)
MH_VEC_OP(&)
MH_VEC_OP(|)
MH_VEC_OP(^)
MH_VEC_OP(<<)
MH_VEC_OP(>>)
#undef MH_VEC_OP
MH_SWIZZLE_OP(+)
MH_SWIZZLE_OP(-)
MH_SWIZZLE_OP(*)
MH_SWIZZLE_OP(/)
#undef MH_SWIZZLE_OP

#define MH_VEC_COMPARE(op)                                                     \
  template <typename T, int N>                                                 \
  inline vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {    \
    vec<bool, N> result;                                                       \
    for (int i = 0; i < N; ++i) result.e[i] = a.e[i] op b.e[i];                \
    return result;                                                             \
  }                                                                            \
  template <typename T, int N, typename S, typename = mh_scalar<S>>            \
  inline vec<bool, N> operator op(const vec<T, N>& a, S b) {                   \
    return a op vec<T, N>(static_cast<T>(b));                                  \
  }
MH_VEC_COMPARE(==)
MH_VEC_COMPARE(!=)
MH_VEC_COMPARE(<)
MH_VEC_COMPARE(<=)
MH_VEC_COMPARE(>)
MH_VEC_COMPARE(>=)
MH_VEC_COMPARE(&&)
MH_VEC_COMPARE(||)
#undef MH_VEC_COMPARE

template <typename T, int N>
inline vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result.e[i] = -a.e[i];
  return result;
}
template <typename T, int N>
inline vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result.e[i] = ~a.e[i];
  return result;
}
template <int N>
inline vec<bool, N> operator!(const vec<bool, N>& a) {
  vec<bool, N> result;
  for (int i = 0; i < N; ++i) result.e[i] = !a.e[i];
  return result;
}
template <int N>
inline bool any(const vec<bool, N>& a) {
  bool result = false;
  for (int i = 0; i < N; ++i) result = result || a.e[i];
  return result;
}
template <int N>
inline bool all(const vec<bool, N>& a) {
  bool result = true;
  for (int i = 0; i < N; ++i) result = result && a.e[i];
  return result;
}
inline bool any(bool a) { return a; }
inline bool all(bool a) { return a; }

#define MH_VEC_NAMES(T)            \
  typedef vec<T, 2> T##2;          \
  typedef vec<T, 3> T##3;          \
  typedef vec<T, 4> T##4;          \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
MH_VEC_NAMES(bool)
MH_VEC_NAMES(char)
MH_VEC_NAMES(uchar)
MH_VEC_NAMES(short)
MH_VEC_NAMES(ushort)
MH_VEC_NAMES(int)
MH_VEC_NAMES(uint)
MH_VEC_NAMES(long)
MH_VEC_NAMES(ulong)
MH_VEC_NAMES(half)
MH_VEC_NAMES(bfloat)
MH_VEC_NAMES(float)
#undef MH_VEC_NAMES

}  // namespace metal
