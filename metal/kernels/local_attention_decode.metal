// Attention of a few queries, each against a range of keys: a ring's slots, or a window's keys.
//
// q [B, H, tokens, D]; k, v [B, Hkv, S, D], all three by their strides; inner, outer: see
// scaled_score; window int, 1 to S; position, key_start [B] int; out [B, tokens, H, splits, D] of O;
// log_totals [B, tokens, H, splits] float, in units of log2(e).
// Grid (32 * splits, 8 * Hkv * parts, B * tokens), threadgroup (32, 8, 1). The H / Hkv heads that
// share a key head are in `parts` of HG, and the keys in splits of SPLIT; a threadgroup owns one of
// each, reads its keys once, and leaves its softmax's mean and the logarithm of its denominator. A
// simdgroup takes every 8th key, a lane every 32nd of the D elements.
constexpr int E = D / 32;
threadgroup float peaks[HG * 8];
threadgroup float totals[HG * 8];
threadgroup float means[2 * 8 * D];  // in turns, so that a barrier per head is enough

const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int heads = q_shape[1];
const int tokens = q_shape[2];
const int slots = k_shape[2];
const int group = heads / k_shape[1];
const int parts = (group + HG - 1) / HG;
const int key_head = int(threadgroup_position_in_grid.y) / parts;
const int first_head = int(threadgroup_position_in_grid.y) % parts * HG;
const int b = int(threadgroup_position_in_grid.z) / tokens;
const int t = int(threadgroup_position_in_grid.z) % tokens;
const int split = int(threadgroup_position_in_grid.x);
const int splits = int(threadgroups_per_grid.x);

// The keys that the query sees: those that are written, or its window; a padding query only its own.
int first_seen = 0;
int last_seen = slots - 1;
int first_key = 0;  // of the first split
if (IS_RING) {
  const int here = position[b];
  const int padding_slot = (here % slots + slots) % slots;
  first_seen = here < 0 ? padding_slot : 0;
  last_seen = here < 0 ? padding_slot : metal::min(here, slots - 1);
} else {
  last_seen = slots - tokens + t;
  first_seen = metal::max(last_seen - window + 1, 0);
  if (HAS_KEY_START) {
    first_seen = metal::min(metal::max(first_seen, int(key_start[b])), last_seen);
  }
  first_key = metal::max(slots - tokens - window + 1, 0);
}
first_key += split * SPLIT;
const int begin = metal::max(first_seen, first_key);
const int end = metal::min(last_seen + 1, first_key + SPLIT);

T query[HG][E];
float sums[HG][E];
float peak[HG];
float total[HG];
#pragma unroll
for (int h = 0; h < HG; ++h) {
  // The last part may have fewer heads: its last one is then computed again and not written.
  const int head = key_head * group + metal::min(first_head + h, group - 1);
  const device T* at = q + b * q_strides[0] + head * q_strides[1] + t * q_strides[2];
  #pragma unroll
  for (int i = 0; i < E; ++i) {
    query[h][i] = at[(i * 32 + lane) * q_strides[3]];
    sums[h][i] = 0.0f;
  }
  peak[h] = -FLT_MAX;
  total[h] = 0.0f;
}

const device T* key_rows = k + b * k_strides[0] + key_head * k_strides[1] + lane * k_strides[3];
const device T* value_rows = v + b * v_strides[0] + key_head * v_strides[1] + lane * v_strides[3];
for (int key = begin + simdgroup; key < end; key += 8) {
  const device T* key_row = key_rows + key * k_strides[2];
  const device T* value_row = value_rows + key * v_strides[2];
  float products[HG];
  #pragma unroll
  for (int h = 0; h < HG; ++h) {
    products[h] = 0.0f;
  }
  #pragma unroll
  for (int i = 0; i < E; ++i) {
    const float element = static_cast<float>(key_row[i * 32 * k_strides[3]]);
    #pragma unroll
    for (int h = 0; h < HG; ++h) {
      products[h] += static_cast<float>(query[h][i]) * element;
    }
  }
  float factors[HG];
  float weights[HG];
  #pragma unroll
  for (int h = 0; h < HG; ++h) {
    const float score = scaled_score<HAS_SOFTCAP>(simd_sum(products[h]), inner, outer);
    const float new_peak = metal::max(peak[h], score);
    factors[h] = metal::exp2(peak[h] - new_peak);
    weights[h] = metal::exp2(score - new_peak);
    peak[h] = new_peak;
    total[h] = total[h] * factors[h] + weights[h];
  }
  #pragma unroll
  for (int i = 0; i < E; ++i) {
    const float element = static_cast<float>(value_row[i * 32 * v_strides[3]]);
    #pragma unroll
    for (int h = 0; h < HG; ++h) {
      sums[h][i] = sums[h][i] * factors[h] + weights[h] * element;
    }
  }
}

if (lane == 0) {
  #pragma unroll
  for (int h = 0; h < HG; ++h) {
    peaks[h * 8 + simdgroup] = peak[h];
    totals[h * 8 + simdgroup] = total[h];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
for (int h = 0; h < HG; ++h) {
  float top = peaks[h * 8];
  for (int s = 1; s < 8; ++s) {
    top = metal::max(top, peaks[h * 8 + s]);
  }
  float all = 0.0f;
  for (int s = 0; s < 8; ++s) {
    all += totals[h * 8 + s] * metal::exp2(peaks[h * 8 + s] - top);
  }
  // Where nothing is visible the mean must not be NaN; its weight, 2^log2(0), is zero.
  const float share = metal::exp2(peak[h] - top) / (all == 0.0f ? 1.0f : all);
  threadgroup float* mean = means + h % 2 * 8 * D;
  #pragma unroll
  for (int i = 0; i < E; ++i) {
    mean[simdgroup * D + i * 32 + lane] = sums[h][i] * share;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (first_head + h < group) {
    const int head = key_head * group + first_head + h;
    const size_t at = ((size_t(b) * tokens + t) * heads + head) * splits + split;
    const int d = simdgroup * 32 + lane;
    if (d == 0) {
      log_totals[at] = top + metal::log2(all);
    }
    if (d < D) {
      float sum = 0.0f;
      for (int s = 0; s < 8; ++s) {
        sum += mean[s * D + d];
      }
      out[at * D + d] = static_cast<O>(sum);
    }
  }
}
