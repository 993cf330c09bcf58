// One tile of h[t] = a[t] * h[t-1] + x[t] for 32 channels: SEG threads share a channel, each owns L
// consecutive tokens. Every thread of the threadgroup calls it, with the same carry in all threads
// of a channel.
//
// x [L] becomes h; a [L]; carry: the state before the tile, on return after it; decays and ends
// [SEG * 32]: what each segment does to the state, h -> decays * h + ends.
template <int SEG, int L>
inline void scan_tile(
    thread float* x,
    const thread float* a,
    thread float& carry,
    threadgroup float* decays,
    threadgroup float* ends,
    uint lane,
    uint segment) {
  float decay = 1.0f;
  float end = 0.0f;
  for (int i = 0; i < L; ++i) {
    end = a[i] * end + x[i];
    decay *= a[i];
  }
  decays[segment * 32 + lane] = decay;
  ends[segment * 32 + lane] = end;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float before = carry;
  for (uint s = 0; s < SEG; ++s) {
    before = s == segment ? carry : before;
    carry = decays[s * 32 + lane] * carry + ends[s * 32 + lane];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read what the next tile overwrites

  for (int i = 0; i < L; ++i) {
    before = a[i] * before + x[i];
    x[i] = before;
  }
}

inline float logistic(float x) {
  return 1.0f / (1.0f + metal::exp(-x));
}

// log(1 + exp(x)) without overflow, and with the digits of a small exp(x), which 1 + it loses.
inline float softplus(float x) {
  return metal::max(x, 0.0f) + log1p(metal::exp(-metal::abs(x)));
}

// What one token does to the state: h -> a * h + x.
struct Step {
  float a;
  float x;
};

// The RG-LRU's gates (Griffin, arXiv:2402.19427, equations 1 to 4); decay_rate is 8 * softplus of
// the recurrent parameter.
inline Step rg_lru_gates(
    float x, float input_gate, float recurrent_gate, float decay_rate, bool is_start) {
  const float log_a = -logistic(recurrent_gate) * decay_rate;
  const float gated = logistic(input_gate) * x;
  // 1 - a^2 with the digits that a loses close to 1: with t = tanh(log a), a^2 = (1 + t) / (1 - t).
  const float t = metal::precise::tanh(log_a);
  const float multiplier = metal::sqrt(-2.0f * t / (1.0f - t));
  Step step;
  step.a = is_start ? 0.0f : metal::exp(log_a);
  step.x = is_start ? gated : gated * multiplier;
  return step;
}
