// As much of MLX's complex numbers as its utils.h needs: the real header overloads on address
// spaces.
#pragma once

#include <metal_stdlib>

using namespace metal;

template <typename T>
struct complex_t {
  T real;
  T imag;
  complex_t() = default;
  constexpr complex_t(T r, T i = T(0)) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
