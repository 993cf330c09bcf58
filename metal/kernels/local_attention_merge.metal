// The softmax over all keys from those over splits of them.
//
// means [rows, splits, D] float; log_totals [rows, splits] float: the logarithms to base 2 of the
// denominators, -infinity where a split saw nothing; out [rows, D].
// Grid (D, rows, 1), threadgroup (D, 1, 1), D a multiple of 32. A thread owns an element; the 32
// lanes of a simdgroup weigh 32 splits at a time and hand the weights around.
const uint d = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint splits = means_shape[1];
const uint width = means_shape[2];
const auto logs = log_totals + size_t(row) * splits;
const auto column = means + size_t(row) * splits * width + d;

float top = -FLT_MAX;
for (uint s = lane; s < splits; s += 32) {
  top = metal::max(top, logs[s]);
}
top = simd_max(top);

float sum = 0.0f;
float total = 0.0f;
for (uint first = 0; first < splits; first += 32) {
  const float weight = first + lane < splits ? metal::exp2(logs[first + lane] - top) : 0.0f;
  total += weight;
  const uint count = metal::min(splits - first, 32u);
  for (uint s = 0; s < count; ++s) {
    sum += simd_shuffle(weight, ushort(s)) * column[size_t(first + s) * width];
  }
}
out[size_t(row) * width + d] = static_cast<T>(sum / simd_sum(total));
