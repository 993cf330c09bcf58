// One token of the RG-LRU with its block-diagonal gates: both products, biases, gates, recurrence.
//
// x, y [B, 1, E]; input_weight, recurrent_weight [H, D, D], a row per input; input_bias,
// recurrent_bias, recurrent_param [E]; h0, h_last [B, E] float; lengths [B] int; reset [B, 1] bool.
// Grid (D rounded up to 32, ROWS, B * H), threadgroup (32, ROWS, 1). A threadgroup owns 32 channels
// of one head; thread (lane, part) adds up every ROWS-th row of its column, so that neighbours read
// weights side by side and each is read once; then part 0 has the sums and steps its channel.
threadgroup float input_sums[ROWS * 32];
threadgroup float recurrent_sums[ROWS * 32];

const uint lane = thread_position_in_threadgroup.x;
const uint part = thread_position_in_threadgroup.y;
const uint column = thread_position_in_grid.x;
const uint heads = input_weight_shape[0];
const uint block = input_weight_shape[1];
const uint b = thread_position_in_grid.z / heads;
const uint head = thread_position_in_grid.z % heads;
const uint width = heads * block;
const bool inside = column < block;
const uint e = head * block + column;
const size_t row = size_t(b) * width;

float input_sum = 0.0f;
float recurrent_sum = 0.0f;
if (inside) {
  for (uint r = part; r < block; r += ROWS) {
    const float value = static_cast<float>(x[row + head * block + r]);
    const size_t at = (size_t(head) * block + r) * block + column;
    input_sum += value * static_cast<float>(input_weight[at]);
    recurrent_sum += value * static_cast<float>(recurrent_weight[at]);
  }
}
input_sums[part * 32 + lane] = input_sum;
recurrent_sums[part * 32 + lane] = recurrent_sum;
threadgroup_barrier(mem_flags::mem_threadgroup);

if (part == 0 && inside) {
  for (uint p = 1; p < ROWS; ++p) {
    input_sum += input_sums[p * 32 + lane];
    recurrent_sum += recurrent_sums[p * 32 + lane];
  }
  float h = 0.0f;
  if (HAS_H0) {
    h = h0[row + e];
  }
  if (!HAS_LENGTHS || lengths[b] > 0) {
    bool is_start = false;
    if (HAS_RESET) {
      is_start = reset[b];
    }
    const Step step = rg_lru_gates(
        static_cast<float>(x[row + e]),
        input_sum + static_cast<float>(input_bias[e]),
        recurrent_sum + static_cast<float>(recurrent_bias[e]),
        8.0f * softplus(static_cast<float>(recurrent_param[e])),
        is_start);
    h = step.a * h + step.x;
  }
  y[row + e] = static_cast<T>(h);
  h_last[row + e] = h;
}
