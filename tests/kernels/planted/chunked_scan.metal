// y[t] = a[t] * y[t - 1] + x[t] along the tokens, in float32.
//
// x, a, y: [B, N, E] T; h0, h_last: [B, E] float.
// Grid (E rounded up to 32, SEG, B), threadgroup (32, SEG, 1). A column of SEG threads owns one
// channel; each scans L tokens from zero, then adds what the segments before it hand on.
constexpr int L = 4;
threadgroup float decay[SEG][32];  // product of a over a segment
threadgroup float ends[SEG][32];   // its last value, from zero
threadgroup float carry[32];       // y before the tile

const uint lane = thread_position_in_threadgroup.x;
const uint seg = thread_position_in_threadgroup.y;
const uint e = thread_position_in_grid.x;
const uint b = thread_position_in_grid.z;
const int tokens = x_shape[1];
const bool inside = e < E;
const size_t base = size_t(b) * tokens * E + e;

if (seg == 0) {
  carry[lane] = inside ? h0[b * E + e] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // for the first tile; its own barrier would do

for (int start = 0; start < tokens; start += SEG * L) {
  float products[L], values[L];
  float p = 1.0f, h = 0.0f;
  for (int i = 0; i < L; ++i) {
    const int t = start + seg * L + i;
    const bool valid = inside && t < tokens;
    const float at = valid ? static_cast<float>(a[base + size_t(t) * E]) : 1.0f;
    const float xt = valid ? static_cast<float>(x[base + size_t(t) * E]) : 0.0f;
    h = at * h + xt;
    p *= at;
    products[i] = p;
    values[i] = h;
  }
  decay[seg][lane] = p;
  ends[seg][lane] = h;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums

  float before = carry[lane];
  for (uint s = 0; s < seg; ++s) {
    before = decay[s][lane] * before + ends[s][lane];
  }
  for (int i = 0; i < L; ++i) {
    const int t = start + seg * L + i;
    if (inside && t < tokens) {
      y[base + size_t(t) * E] = static_cast<T>(products[i] * before + values[i]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has read the tile's
  if (seg == SEG - 1) {
    carry[lane] = p * before + h;
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);  // carry is the last one
if (seg == 0 && inside) {
  h_last[b * E + e] = carry[lane];
}
