// A score in units of log2(e), so that softmax is of powers of two. Without a softcap the scale is
// in `outer`, and with it in `inner`.
template <bool HAS_SOFTCAP>
inline float scaled_score(float product, float inner, float outer) {
  return HAS_SOFTCAP ? outer * metal::precise::tanh(inner * product) : outer * product;
}

// A row of D values into threadgroup memory by a simdgroup, neighbours reading neighbours; zeros if
// there is no such row.
template <typename T, int D>
inline void load_row(
    threadgroup T* row, const device T* source, int64_t stride, bool exists, int lane) {
  source += lane * stride;
  for (int d = lane; d < D; d += 32) {
    row[d] = exists ? *source : static_cast<T>(0.0f);
    source += 32 * stride;
  }
}
