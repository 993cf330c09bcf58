// Scalar types of the Metal language that C++ lacks, and the keywords that it can do without.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;

// Address spaces are the lint's business. `threadgroup` storage was rewritten before this point.
#define device
#define constant
#define thread
#define threadgroup
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 310
#define __METAL__ 1

namespace metal {

template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};
template <typename T, typename U>
constexpr bool is_same_v = is_same<T, U>::value;
template <typename T>
struct remove_cv {
  using type = T;
};
template <typename T>
struct remove_cv<const T> : remove_cv<T> {};
template <typename T>
struct remove_cv<volatile T> : remove_cv<T> {};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;
template <typename T>
struct remove_reference {
  using type = T;
};
template <typename T>
struct remove_reference<T&> {
  using type = T;
};
template <typename T>
using remove_reference_t = typename remove_reference<T>::type;
template <typename From, typename To>
constexpr bool is_convertible_v = __is_constructible(To, From) && !__is_class(To);

// bfloat: converts to float by itself; anything becomes a bfloat only when asked to.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <typename T, typename = enable_if_t<__is_constructible(float, T)>>
  explicit constexpr bfloat(T value) : bits(round(static_cast<float>(value))) {}
  constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }

 private:
  static constexpr uint16_t round(float value) {
    return value != value
        ? uint16_t(0x7fc0)
        : uint16_t(
              (__builtin_bit_cast(uint32_t, value) + 0x7fff +
               ((__builtin_bit_cast(uint32_t, value) >> 16) & 1)) >>
              16);
  }
};

template <typename T>
struct is_integral : false_type {};
template <typename T>
struct is_floating_point : false_type {};
#define MH_INTEGRAL(T) \
  template <>          \
  struct is_integral<T> : true_type {};
MH_INTEGRAL(bool)
MH_INTEGRAL(char)
MH_INTEGRAL(signed char)
MH_INTEGRAL(uchar)
MH_INTEGRAL(short)
MH_INTEGRAL(ushort)
MH_INTEGRAL(int)
MH_INTEGRAL(uint)
MH_INTEGRAL(long)
MH_INTEGRAL(ulong)
#undef MH_INTEGRAL
template <>
struct is_floating_point<float> : true_type {};
template <>
struct is_floating_point<half> : true_type {};
template <>
struct is_floating_point<bfloat> : true_type {};
template <typename T>
constexpr bool is_integral_v = is_integral<remove_cv_t<T>>::value;
template <typename T>
constexpr bool is_floating_point_v = is_floating_point<remove_cv_t<T>>::value;
template <typename T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <typename T>
struct is_arithmetic : integral_constant<bool, is_arithmetic_v<T>> {};
template <typename T>
constexpr bool is_signed_v =
    is_floating_point_v<T> || static_cast<remove_cv_t<T>>(-1) < static_cast<remove_cv_t<T>>(0);
template <typename T>
constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;

// bfloat with bfloat or an integer stays bfloat, rounded after every operation; with float or half
// it is float by the conversion above.
#define MH_BFLOAT_OP(op)                                                                      \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }   \
  template <typename T, typename = enable_if_t<is_integral_v<T>>>                             \
  constexpr bfloat operator op(bfloat a, T b) {                                               \
    return a op bfloat(b);                                                                    \
  }                                                                                           \
  template <typename T, typename = enable_if_t<is_integral_v<T>>>                             \
  constexpr bfloat operator op(T a, bfloat b) {                                               \
    return bfloat(a) op b;                                                                    \
  }                                                                                           \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }                \
  template <typename T, typename = enable_if_t<is_integral_v<T>>>                             \
  constexpr bfloat& operator op##=(bfloat& a, T b) {                                          \
    return a = a op bfloat(b);                                                                \
  }
MH_BFLOAT_OP(+)
MH_BFLOAT_OP(-)
MH_BFLOAT_OP(*)
MH_BFLOAT_OP(/)
#undef MH_BFLOAT_OP
constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
constexpr bfloat operator+(bfloat a) { return a; }

}  // namespace metal

constexpr half operator""h(long double value) { return static_cast<half>(value); }
constexpr metal::bfloat operator""bf(long double value) {
  return metal::bfloat(static_cast<float>(value));
}

template <typename To, typename From>
inline To mh_copy_bits(const From& value, metal::false_type) {
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}
template <typename To, typename From>
constexpr To mh_copy_bits(From value, metal::true_type) {
  return __builtin_bit_cast(To, value);
}
template <typename To, typename From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return mh_copy_bits<To>(value, metal::integral_constant<bool,
      __is_trivially_copyable(To) && __is_trivially_copyable(From)>());
}

namespace metal {
using ::as_type;

template <typename T>
struct numeric_limits;
#define MH_INTEGER_LIMITS(T, smallest, largest, binary_digits)       \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr bool is_integer = true;                         \
    static constexpr int digits = binary_digits;                     \
    static constexpr T max() { return largest; }                     \
    static constexpr T min() { return smallest; }                    \
    static constexpr T lowest() { return smallest; }                 \
  };
MH_INTEGER_LIMITS(bool, false, true, 1)
MH_INTEGER_LIMITS(char, -128, 127, 7)
MH_INTEGER_LIMITS(signed char, -128, 127, 7)
MH_INTEGER_LIMITS(uchar, 0, 255, 8)
MH_INTEGER_LIMITS(short, -32768, 32767, 15)
MH_INTEGER_LIMITS(ushort, 0, 65535, 16)
MH_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647, 31)
MH_INTEGER_LIMITS(uint, 0, 4294967295u, 32)
MH_INTEGER_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l, 63)
MH_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul, 64)
#undef MH_INTEGER_LIMITS
#define MH_FLOAT_LIMITS(T, Bits, smallest, largest, inf, nan, eps)                    \
  template <>                                                                         \
  struct numeric_limits<T> {                                                          \
    static constexpr bool is_integer = false;                                         \
    static constexpr T of(Bits bits) { return __builtin_bit_cast(T, bits); }          \
    static constexpr T min() { return of(smallest); }                                 \
    static constexpr T max() { return of(largest); }                                  \
    static constexpr T lowest() { return -of(largest); }                              \
    static constexpr T infinity() { return of(inf); }                                 \
    static constexpr T quiet_NaN() { return of(nan); }                                \
    static constexpr T epsilon() { return of(eps); }                                  \
  };
MH_FLOAT_LIMITS(float, uint32_t, 0x00800000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x34000000)
MH_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x7c00, 0x7e00, 0x1400)
MH_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x7f80, 0x7fc0, 0x3c00)
#undef MH_FLOAT_LIMITS

}  // namespace metal

#define INFINITY (metal::numeric_limits<float>::infinity())
#define NAN (metal::numeric_limits<float>::quiet_NaN())
#define HUGE_VALF INFINITY
#define MAXFLOAT (metal::numeric_limits<float>::max())
#define FLT_MAX MAXFLOAT
#define FLT_MIN (metal::numeric_limits<float>::min())
#define FLT_EPSILON (metal::numeric_limits<float>::epsilon())
#define HALF_MAX (metal::numeric_limits<half>::max())
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979f
#define M_PI_2_F 1.57079632679490f
#define M_PI_4_F 0.785398163397448f
#define M_1_PI_F 0.318309886183791f
#define M_2_PI_F 0.636619772367581f
#define M_2_SQRTPI_F 1.12837916709551f
#define M_SQRT2_F 1.41421356237310f
#define M_SQRT1_2_F 0.707106781186548f
#define M_E_F 2.71828182845905f
#define M_LOG2E_F 1.44269504088896f
#define M_LOG10E_F 0.434294481903252f
#define M_LN2_F 0.693147180559945f
#define M_LN10_F 2.30258509299405f
