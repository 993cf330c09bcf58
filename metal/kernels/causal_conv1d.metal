// Causal depthwise convolution, and the K - 1 inputs that continue it after each row's length.
//
// u, y [B, T, E]; weight [E, K]; bias [E]; state, next_state [B, K-1, E]; lengths [B] int; reset
// [B, T] bool.
// Grid (E rounded up to 32, ceil(tokens / L), B), threadgroup (a multiple of 32, 1, 1). A thread
// owns L consecutive tokens of one channel and walks them in order behind the K - 1 tokens before
// them, so that neighbours read neighbours. Its window holds the last K inputs, oldest first, of
// the sequence that the current token belongs to, and zeros before that sequence's start. The
// window at a row's last valid token is the next state: the thread that owns that token stores it,
// or, in a row without any, the one that owns the first.
const uint e = thread_position_in_grid.x;
const int begin = int(thread_position_in_grid.y) * L;
const uint b = thread_position_in_grid.z;
const int lane = int(thread_index_in_simdgroup);
const int tokens = u_shape[1];
const uint width = u_shape[2];
const int length = HAS_LENGTHS ? metal::clamp(int(lengths[b]), 0, tokens) : tokens;
const size_t row = size_t(b) * tokens;
const size_t past = size_t(b) * (K - 1);

// Bit i: a sequence starts at the i-th token of the walk. A lane looks up one token for all: every
// lane would read the same bytes.
uint starts = 0;
if (HAS_RESET) {
  const int t = begin - (K - 1) + lane;
  bool is_start = false;
  if (lane < K - 1 + L && t >= 0 && t < tokens) {
    is_start = reset[row + t];
  }
  starts = simd_or(is_start ? 1u << lane : 0u);
}

if (e < width) {
  float taps[K];
  float window[K];
  for (int k = 0; k < K; ++k) {
    taps[k] = static_cast<float>(weight[size_t(e) * K + k]);
    window[k] = 0.0f;
  }
  const float base = static_cast<float>(bias[e]);

  for (int i = 0; i < K - 1 + L; ++i) {
    const int t = begin - (K - 1) + i;
    const bool is_start = ((starts >> i) & 1u) != 0;
    for (int k = 0; k < K - 1; ++k) {
      window[k] = is_start ? 0.0f : window[k + 1];
    }
    if (t < 0) {
      window[K - 1] = static_cast<float>(state[(past + uint(K - 1 + t)) * width + e]);
    } else if (t < tokens) {
      window[K - 1] = static_cast<float>(u[(row + t) * width + e]);
    }
    if (i >= K - 1 && t < tokens) {
      float sum = base;
      for (int k = 0; k < K; ++k) {
        sum += taps[k] * window[k];
      }
      y[(row + t) * width + e] = static_cast<T>(sum);
    }
    if (t == length - 1 && (i >= K - 1 || begin == 0)) {
      for (int k = 0; k < K - 1; ++k) {
        next_state[(past + k) * width + e] = static_cast<T>(window[k + 1]);
      }
    }
  }
}
