// The RG-LRU along the tokens: gates, decay, multiplier and recurrence, with a float32 state.
//
// x, y [B, T, E]; input_gate, recurrent_gate: pre-activations, [B, T, E], or, if IS_BLOCK, as the
// block-diagonal products leave them, [B, heads, T, E / heads], to which input_bias and
// recurrent_bias [E] are added; recurrent_param [E]; h0, h_last [B, E] float; lengths [B] int;
// reset [B, T] bool.
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

// Where the gates of token t are: gates + t * gate_stride.
size_t gates = row * width + e;
size_t gate_stride = width;
float carry = 0.0f;
float decay_rate = 0.0f;
float input_offset = 0.0f;
float recurrent_offset = 0.0f;
if (inside) {
  if (HAS_H0) {
    carry = h0[size_t(b) * width + e];
  }
  decay_rate = 8.0f * softplus(static_cast<float>(recurrent_param[e]));
  if (IS_BLOCK) {
    const uint block = input_gate_shape[3];
    gates = ((size_t(b) * (width / block) + e / block) * tokens) * block + e % block;
    gate_stride = block;
    input_offset = static_cast<float>(input_bias[e]);
    recurrent_offset = static_cast<float>(recurrent_bias[e]);
  }
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
      const size_t gate = gates + size_t(t) * gate_stride;
      const Step step = rg_lru_gates(
          static_cast<float>(x[(row + t) * width + e]),
          static_cast<float>(input_gate[gate]) + input_offset,
          static_cast<float>(recurrent_gate[gate]) + recurrent_offset,
          decay_rate,
          is_start);
      h[i] = step.x;
      decay[i] = step.a;
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
