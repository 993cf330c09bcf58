// The math functions of the Metal library, computed in float as the GPU does at its best: fast::
// and precise:: give the same values here.
#pragma once

#include "mh_vec.h"

namespace metal {

#define MH_EACH(N, expression)                            \
  for (int i = 0; i < N; ++i) result.e[i] = expression;   \
  return result;

// A function of one number, for every type that has it.
#define MH_MATH1(name, computed)                                                       \
  inline float name(float x) { return computed; }                                      \
  inline half name(half h) { return static_cast<half>(name(static_cast<float>(h))); }  \
  inline bfloat name(bfloat b) { return bfloat(name(static_cast<float>(b))); }         \
  template <typename T, int N>                                                         \
  inline vec<T, N> name(const vec<T, N>& v) {                                          \
    vec<T, N> result;                                                                  \
    MH_EACH(N, name(v.e[i]))                                                           \
  }
#define MH_MATH2(name, computed)                                                     \
  inline float name(float x, float y) { return computed; }                           \
  inline half name(half a, half b) {                                                 \
    return static_cast<half>(name(static_cast<float>(a), static_cast<float>(b)));    \
  }                                                                                  \
  inline bfloat name(bfloat a, bfloat b) {                                           \
    return bfloat(name(static_cast<float>(a), static_cast<float>(b)));               \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) {                    \
    vec<T, N> result;                                                                \
    MH_EACH(N, name(a.e[i], b.e[i]))                                                 \
  }

#define MH_TRANSCENDENTAL                                                       \
  MH_MATH1(acos, __builtin_acosf(x))                                            \
  MH_MATH1(acosh, __builtin_acoshf(x))                                          \
  MH_MATH1(asin, __builtin_asinf(x))                                            \
  MH_MATH1(asinh, __builtin_asinhf(x))                                          \
  MH_MATH1(atan, __builtin_atanf(x))                                            \
  MH_MATH1(atanh, __builtin_atanhf(x))                                          \
  MH_MATH1(ceil, __builtin_ceilf(x))                                            \
  MH_MATH1(cos, __builtin_cosf(x))                                              \
  MH_MATH1(cosh, __builtin_coshf(x))                                            \
  MH_MATH1(cospi, __builtin_cosf(x * M_PI_F))                                   \
  MH_MATH1(exp, __builtin_expf(x))                                              \
  MH_MATH1(exp10, __builtin_powf(10.0f, x))                                     \
  MH_MATH1(exp2, __builtin_exp2f(x))                                            \
  MH_MATH1(fabs, __builtin_fabsf(x))                                            \
  MH_MATH1(floor, __builtin_floorf(x))                                          \
  MH_MATH1(fract, __builtin_fminf(x - __builtin_floorf(x), 0.99999994f))     \
  MH_MATH1(log, __builtin_logf(x))                                              \
  MH_MATH1(log10, __builtin_log10f(x))                                          \
  MH_MATH1(log2, __builtin_log2f(x))                                            \
  MH_MATH1(rint, __builtin_rintf(x))                                            \
  MH_MATH1(round, __builtin_roundf(x))                                          \
  MH_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))                                    \
  MH_MATH1(sin, __builtin_sinf(x))                                              \
  MH_MATH1(sinh, __builtin_sinhf(x))                                            \
  MH_MATH1(sinpi, __builtin_sinf(x * M_PI_F))                                   \
  MH_MATH1(sqrt, __builtin_sqrtf(x))                                            \
  MH_MATH1(tan, __builtin_tanf(x))                                              \
  MH_MATH1(tanh, __builtin_tanhf(x))                                            \
  MH_MATH1(trunc, __builtin_truncf(x))                                          \
  MH_MATH2(atan2, __builtin_atan2f(x, y))                                       \
  MH_MATH2(copysign, __builtin_copysignf(x, y))                                 \
  MH_MATH2(divide, x / y)                                                       \
  MH_MATH2(fdim, __builtin_fdimf(x, y))                                         \
  MH_MATH2(fmax, __builtin_fmaxf(x, y))                                         \
  MH_MATH2(fmin, __builtin_fminf(x, y))                                         \
  MH_MATH2(fmod, __builtin_fmodf(x, y))                                         \
  MH_MATH2(nextafter, __builtin_nextafterf(x, y))                               \
  MH_MATH2(pow, __builtin_powf(x, y))                                           \
  MH_MATH2(powr, __builtin_powf(x, y))
MH_TRANSCENDENTAL
namespace fast {
MH_TRANSCENDENTAL
}
namespace precise {
MH_TRANSCENDENTAL
}
#undef MH_TRANSCENDENTAL
MH_MATH1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == x ? x : 0.0f)
MH_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MH_MATH2(step, y < x ? 0.0f : 1.0f)
#undef MH_MATH1
#undef MH_MATH2

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
  return static_cast<half>(fma(float(a), float(b), float(c)));
}
inline bfloat fma(bfloat a, bfloat b, bfloat c) {
  return bfloat(fma(float(a), float(b), float(c)));
}
template <typename T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  MH_EACH(N, fma(a.e[i], b.e[i], c.e[i]))
}
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline half ldexp(half x, int k) { return static_cast<half>(__builtin_ldexpf(x, k)); }

// Per type, as in Metal: a call that mixes types is ambiguous there and here.
#define MH_ORDERED(T)                                                         \
  inline T min(T a, T b) { return b < a ? b : a; }                            \
  inline T max(T a, T b) { return a < b ? b : a; }                            \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }       \
  inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                  \
  inline T max3(T a, T b, T c) { return max(a, max(b, c)); }                  \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
MH_ORDERED(char)
MH_ORDERED(signed char)
MH_ORDERED(uchar)
MH_ORDERED(short)
MH_ORDERED(ushort)
MH_ORDERED(int)
MH_ORDERED(uint)
MH_ORDERED(long)
MH_ORDERED(ulong)
#undef MH_ORDERED
// Of two floats one of which is NaN, min and max give the other.
#define MH_ORDERED_FLOAT(T)                                                   \
  inline T min(T a, T b) { return fmin(a, b); }                               \
  inline T max(T a, T b) { return fmax(a, b); }                               \
  inline T clamp(T x, T low, T high) { return fmin(fmax(x, low), high); }     \
  inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                  \
  inline T max3(T a, T b, T c) { return max(a, max(b, c)); }                  \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); } \
  inline T fmin3(T a, T b, T c) { return fmin(a, fmin(b, c)); }               \
  inline T fmax3(T a, T b, T c) { return fmax(a, fmax(b, c)); }               \
  inline T mix(T a, T b, T t) { return a + (b - a) * t; }                     \
  inline T abs(T a) { return fabs(a); }                                       \
  inline bool isnan(T a) { return a != a; }                                   \
  inline bool isinf(T a) { return fabs(float(a)) == INFINITY; }               \
  inline bool isfinite(T a) { return fabs(float(a)) < INFINITY; }             \
  inline bool signbit(T a) { return __builtin_signbit(float(a)); }
MH_ORDERED_FLOAT(float)
MH_ORDERED_FLOAT(half)
MH_ORDERED_FLOAT(bfloat)
#undef MH_ORDERED_FLOAT
template <typename T, int N>
inline vec<T, N> min(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> result;
  MH_EACH(N, min(a.e[i], b.e[i]))
}
template <typename T, int N>
inline vec<T, N> max(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> result;
  MH_EACH(N, max(a.e[i], b.e[i]))
}
template <typename T, int N>
inline vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) {
  return min(max(x, low), high);
}
template <typename T, int N>
inline vec<T, N> clamp(const vec<T, N>& x, T low, T high) {
  return min(max(x, vec<T, N>(low)), vec<T, N>(high));
}
template <typename T, int N>
inline vec<T, N> mix(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& t) {
  return a + (b - a) * t;
}
template <typename T, int N>
inline vec<T, N> abs(const vec<T, N>& v) {
  vec<T, N> result;
  MH_EACH(N, abs(v.e[i]))
}
inline char abs(char x) { return x < 0 ? -x : x; }
inline short abs(short x) { return x < 0 ? -x : x; }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline uint absdiff(int a, int b) { return a > b ? uint(a) - uint(b) : uint(b) - uint(a); }

template <typename T>
inline T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <typename T, int N>
inline vec<T, N> select(const vec<T, N>& f, const vec<T, N>& t, const vec<bool, N>& c) {
  vec<T, N> result;
  MH_EACH(N, c.e[i] ? t.e[i] : f.e[i])
}
template <typename T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a.e[0] * b.e[0];
  for (int i = 1; i < N; ++i) sum = sum + a.e[i] * b.e[i];
  return sum;
}
template <typename T, int N>
inline T length_squared(const vec<T, N>& v) {
  return dot(v, v);
}
template <typename T, int N>
inline T length(const vec<T, N>& v) {
  return sqrt(dot(v, v));
}
#undef MH_EACH

inline int popcount(uint x) { return __builtin_popcount(x); }
inline int popcount(ulong x) { return __builtin_popcountl(x); }
inline int clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline int clz(int x) { return clz(uint(x)); }
inline int ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline int ctz(int x) { return ctz(uint(x)); }
inline int popcount(int x) { return popcount(uint(x)); }
inline uint rotate(uint x, uint by) { return x << (by & 31) | x >> (-by & 31); }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
inline int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
inline uint extract_bits(uint x, uint at, uint count) {
  return count == 0 ? 0 : (x >> at) & (0xffffffffu >> (32 - count));
}

}  // namespace metal
