// y = x * rsqrt(mean(x^2) + eps) * (1 + weight) over rows of D values, in float32, rounded once.
//
// x, y [rows, D]; weight [D]; eps: one float.
// Grid (threads, rows, 1), threadgroup (threads, 1, 1), threads a multiple of 32 up to 256. A
// threadgroup owns a row; its threads stride over it, so that neighbours read neighbours. A thread
// keeps its first KEPT values in registers; only what lies past KEPT * threads is read again.
threadgroup float partial_sums[8];

const uint threads = threads_per_threadgroup.x;
const uint first = thread_position_in_threadgroup.x;
const uint width = weight_shape[0];
const size_t row = size_t(threadgroup_position_in_grid.y) * width;

float kept[KEPT];
float sum = 0.0f;
#pragma unroll
for (uint i = 0; i < KEPT; ++i) {
  const uint d = first + i * threads;
  kept[i] = d < width ? static_cast<float>(x[row + d]) : 0.0f;
  sum += kept[i] * kept[i];
}
for (uint d = first + KEPT * threads; d < width; d += threads) {
  const float value = static_cast<float>(x[row + d]);
  sum += value * value;
}
sum = simd_sum(sum);
if (thread_index_in_simdgroup == 0) {
  partial_sums[simdgroup_index_in_threadgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float total = 0.0f;
for (uint s = 0; s < threads / 32; ++s) {
  total += partial_sums[s];
}
const float scale = metal::precise::rsqrt(total / float(width) + eps);

#pragma unroll
for (uint i = 0; i < KEPT; ++i) {
  const uint d = first + i * threads;
  if (d < width) {
    y[row + d] = static_cast<T>(kept[i] * scale * (1.0f + static_cast<float>(weight[d])));
  }
}
for (uint d = first + KEPT * threads; d < width; d += threads) {
  const float value = static_cast<float>(x[row + d]);
  y[row + d] = static_cast<T>(value * scale * (1.0f + static_cast<float>(weight[d])));
}
