// y[t] = a[t] * y[t-1] + x[t] along the tokens, with a float32 state.
//
// x, a, y [B, T, E]; h0, h_last [B, E] float; lengths [B] int; reset [B, T] bool.
// Grid (E rounded up to 32, SEG, B), threadgroup (32, SEG, 1): see scan_tile. Everything is read
// and written once, by neighbours side by side; past a row's length the state stands still.
threadgroup float decays[SEG * 32];
threadgroup float ends[SEG * 32];

const uint lane = thread_position_in_threadgroup.x;
const uint segment = thread_position_in_threadgroup.y;
const uint e = thread_position_in_grid.x;
const uint b = thread_position_in_grid.z;
const int tokens = x_shape[1];
const uint width = x_shape[2];
const bool inside = e < width;
const int length = HAS_LENGTHS ? metal::clamp(int(lengths[b]), 0, tokens) : tokens;
const size_t row = size_t(b) * tokens;

float carry = 0.0f;
if (HAS_H0 && inside) {
  carry = h0[size_t(b) * width + e];
}
for (int tile = 0; tile < tokens; tile += SEG * L) {
  const int begin = tile + int(segment) * L;
  // A lane looks up one token's reset for all: every lane would read the same L bytes.
  const int mine = begin + int(lane);
  bool starts = false;
  if (HAS_RESET && lane < L && mine < length) {
    starts = reset[row + mine];
  }
  float h[L];
  float decay[L];
  for (int i = 0; i < L; ++i) {
    const int t = begin + i;
    const bool is_start = HAS_RESET && simd_shuffle(int(starts), ushort(i)) != 0;
    h[i] = 0.0f;
    decay[i] = 1.0f;
    if (inside && t < length) {
      const size_t at = (row + t) * width + e;
      h[i] = static_cast<float>(x[at]);
      decay[i] = is_start ? 0.0f : static_cast<float>(a[at]);
    }
  }
  scan_tile<SEG, L>(h, decay, carry, decays, ends, lane, segment);
  for (int i = 0; i < L; ++i) {
    const int t = begin + i;
    if (inside && t < tokens) {
      y[(row + t) * width + e] = static_cast<T>(h[i]);
    }
  }
}
if (inside && segment == 0) {
  h_last[size_t(b) * width + e] = carry;
}
