// One token of the RG-LRU, with a float32 state.
//
// x, y [B, 1, E]; input_gate, recurrent_gate: pre-activations [B, 1, E]; recurrent_param [E]; h0,
// h_last [B, E] float; lengths [B] int; reset [B, 1] bool.
// Grid (E, B, 1): a thread per channel and row.
const uint e = thread_position_in_grid.x;
const uint b = thread_position_in_grid.y;
const uint width = x_shape[2];
const size_t at = size_t(b) * width + e;

float h = 0.0f;
if (HAS_H0) {
  h = h0[at];
}
if (!HAS_LENGTHS || lengths[b] > 0) {
  bool is_start = false;
  if (HAS_RESET) {
    is_start = reset[b];
  }
  const Step step = rg_lru_gates(
      static_cast<float>(x[at]),
      static_cast<float>(input_gate[at]),
      static_cast<float>(recurrent_gate[at]),
      8.0f * softplus(static_cast<float>(recurrent_param[e])),
      is_start);
  h = step.a * h + step.x;
}
y[at] = static_cast<T>(h);
h_last[at] = h;
