// Causal attention over a window, softmax on the way: no score leaves the threadgroup.
//
// q [B, H, tokens, D]; k, v [B, Hkv, S, D], all three by their strides; inner, outer: see
// scaled_score; window int, 1 to S; key_start, lengths [B] int; out [B, tokens, H, D].
// Grid (32 * tiles, BQ / 8 * Hkv, B), threadgroup (32, BQ / 8, 1). The queries of the G = H / Hkv
// heads that share a key head are its rows, row = position * G + head; a threadgroup owns BQ of
// them, a simdgroup 8, and walks the keys that any of them sees, BK at a time. `queries` holds the
// tile's rows; `keys` holds BK keys and then, after a barrier, their values.
//
// An 8x8 matrix lies in a simdgroup as in MLX's steel/attn/mma.h: a lane has two adjacent columns of
// one row, so lanes that differ in bits 0 and 3 share a row. All matrices are float.
constexpr int LD = D + int(16 / sizeof(T));  // rows begin at different banks
threadgroup T queries[BQ * LD];
threadgroup T keys[BK * LD];

const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int key_head = int(threadgroup_position_in_grid.y);
const int b = int(threadgroup_position_in_grid.z);
const int heads = q_shape[1];
const int tokens = q_shape[2];
const int group = heads / k_shape[1];
const int before = k_shape[2] - tokens;  // keys before the first query's own
const int valid = HAS_LENGTHS ? metal::min(int(lengths[b]), tokens) : tokens;
const int start = HAS_KEY_START ? int(key_start[b]) : 0;

// What the tile reads: from the first key that its first query sees to its last query's own.
const int first_row = int(threadgroup_position_in_grid.x) * BQ;
const int first_position = first_row / group;
const int last_position = metal::min((first_row + BQ - 1) / group, valid - 1);
const int first_query = before + first_position;
const int first_key = metal::max(
    metal::max(first_query - window + 1, 0), metal::min(start, first_query));
const int end_key = last_position < first_position ? first_key : before + last_position + 1;

// The row of this lane, and the keys that it sees: a padding query only its own, and a row past the
// length none.
const int quad = lane / 4;
const int row = (quad & 4) + lane / 2 % 4;
const int column = (quad & 2) * 2 + lane % 2 * 2;
const int position = (first_row + simdgroup * 8 + row) / group;
const int head = key_head * group + (first_row + simdgroup * 8 + row) % group;
const bool is_valid = position < valid;
const int last_seen = is_valid ? before + position : -1;
const int first_seen = metal::min(metal::max(last_seen - window + 1, start), last_seen);

for (int i = simdgroup * 8; i < simdgroup * 8 + 8; ++i) {
  const int at = (first_row + i) / group;
  const int of = key_head * group + (first_row + i) % group;
  const device T* source = q + b * q_strides[0] + of * q_strides[1] + at * q_strides[2];
  load_row<T, D>(queries + i * LD, source, q_strides[3], at < valid, lane);
}

const device T* key_rows = k + b * k_strides[0] + key_head * k_strides[1];
const device T* value_rows = v + b * v_strides[0] + key_head * v_strides[1];
const threadgroup T* query = queries + (simdgroup * 8 + row) * LD + column;

simdgroup_float8x8 sums[D / 8];
#pragma unroll
for (int i = 0; i < D / 8; ++i) {
  sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
float peak = -FLT_MAX;  // of the row's scores
float total = 0.0f;  // of the row's weights, in this lane's columns
for (int key = first_key; key < end_key; key += BK) {
  for (int i = simdgroup; i < BK; i += BQ / 8) {
    const device T* source = key_rows + (key + i) * k_strides[2];
    load_row<T, D>(keys + i * LD, source, k_strides[3], key + i < end_key, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_float8x8 weights[BK / 8];
  #pragma unroll
  for (int n = 0; n < BK / 8; ++n) {
    weights[n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int d = 0; d < D; d += 8) {
    simdgroup_float8x8 left;
    left.thread_elements()[0] = static_cast<float>(query[d]);
    left.thread_elements()[1] = static_cast<float>(query[d + 1]);
    #pragma unroll
    for (int n = 0; n < BK / 8; ++n) {
      const threadgroup T* at = keys + (n * 8 + column) * LD + d + row;
      simdgroup_float8x8 right;
      right.thread_elements()[0] = static_cast<float>(at[0]);
      right.thread_elements()[1] = static_cast<float>(at[LD]);
      simdgroup_multiply_accumulate(weights[n], left, right, weights[n]);
    }
  }

  float new_peak = peak;
  #pragma unroll
  for (int n = 0; n < BK / 8; ++n) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = key + n * 8 + column + i;
      float score = scaled_score<HAS_SOFTCAP>(weights[n].thread_elements()[i], inner, outer);
      score = first_seen <= at && at <= last_seen ? score : -INFINITY;
      weights[n].thread_elements()[i] = score;
      new_peak = metal::max(new_peak, score);
    }
  }
  new_peak = metal::max(new_peak, simd_shuffle_xor(new_peak, ushort(1)));
  new_peak = metal::max(new_peak, simd_shuffle_xor(new_peak, ushort(8)));
  const float factor = metal::exp2(peak - new_peak);
  peak = new_peak;
  total *= factor;
  #pragma unroll
  for (int n = 0; n < BK / 8; ++n) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = metal::exp2(weights[n].thread_elements()[i] - peak);
      weights[n].thread_elements()[i] = weight;
      total += weight;
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read the keys
  for (int i = simdgroup; i < BK; i += BQ / 8) {
    const device T* source = value_rows + (key + i) * v_strides[2];
    load_row<T, D>(keys + i * LD, source, v_strides[3], key + i < end_key, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  #pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    sums[i].thread_elements()[0] *= factor;
    sums[i].thread_elements()[1] *= factor;
    // As in MLX's steel attention: the compiler must not load all of it ahead, into registers.
    simdgroup_barrier(mem_flags::mem_none);
    #pragma unroll
    for (int n = 0; n < BK / 8; ++n) {
      const threadgroup T* at = keys + (n * 8 + row) * LD + i * 8 + column;
      simdgroup_float8x8 right;
      right.thread_elements()[0] = static_cast<float>(at[0]);
      right.thread_elements()[1] = static_cast<float>(at[1]);
      simdgroup_multiply_accumulate(sums[i], weights[n], right, sums[i]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read the values
}

total += simd_shuffle_xor(total, ushort(1));
total += simd_shuffle_xor(total, ushort(8));
if (position < tokens) {
  const float inverse = is_valid ? 1.0f / total : 0.0f;
  const size_t at = ((size_t(b) * tokens + position) * heads + head) * D + column;
  #pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    out[at + i * 8] = static_cast<T>(sums[i].thread_elements()[0] * inverse);
    out[at + i * 8 + 1] = static_cast<T>(sums[i].thread_elements()[1] * inverse);
  }
}
