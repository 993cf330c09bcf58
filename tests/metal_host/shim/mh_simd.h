// Barriers and the operations across the lanes of a simdgroup.
#pragma once

#include "mh_abi.h"
#include "mh_math.h"

// Where in the kernel a call stands: default arguments are evaluated there.
#define MH_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}

inline void threadgroup_barrier(mem_flags flags, MH_SITE) {
  mh_threadgroup_barrier(static_cast<unsigned>(flags), file, line);
}
inline void simdgroup_barrier(mem_flags flags, MH_SITE) {
  mh_simdgroup_barrier(static_cast<unsigned>(flags), file, line);
}

namespace mh_detail {

template <typename T>
struct scalar_of {
  using type = T;
};
template <typename T, int N>
struct scalar_of<vec<T, N>> {
  using type = T;
};
// What a lane can hand to another: 64-bit numbers and bool only by MLX's own overloads.
template <typename T>
using lane_type = enable_if_t<
    is_arithmetic_v<typename scalar_of<T>::type> && sizeof(typename scalar_of<T>::type) <= 4 &&
    !is_same_v<T, bool>>;

template <typename T>
inline T take(const unsigned char* rows, unsigned lane) {
  T value;
  __builtin_memcpy(&value, rows + lane * mh::kPayload, sizeof(T));
  return value;
}
template <typename T>
inline void put(unsigned char* rows, unsigned lane, const T& value) {
  __builtin_memcpy(rows + lane * mh::kPayload, &value, sizeof(T));
}
template <typename Out, typename In>
inline Out collective(const In& in, mh::Combine combine, const char* file, int line) {
  static_assert(sizeof(In) <= mh::kPayload && sizeof(Out) <= mh::kPayload, "payload too wide");
  Out out;
  mh_collective(&in, &out, sizeof(In), sizeof(Out), combine, file, line);
  return out;
}

#define MH_REDUCER(Name, expression)                           \
  struct Name {                                                \
    template <typename T>                                      \
    static T apply(T a, T b) {                                 \
      return static_cast<T>(expression);                       \
    }                                                          \
  };
MH_REDUCER(Sum, a + b)
MH_REDUCER(Product, a* b)
MH_REDUCER(Min, min(a, b))
MH_REDUCER(Max, max(a, b))
MH_REDUCER(And, a& b)
MH_REDUCER(Or, a | b)
MH_REDUCER(Xor, a ^ b)
#undef MH_REDUCER

// bfloat is summed in float, as MLX's bf16_math.h has it.
template <typename T>
struct accumulator {
  using type = T;
};
template <>
struct accumulator<bfloat> {
  using type = float;
};

// A tree over neighbours at distance 1, 2, 4, ...: the order of the butterfly by lane ^ distance.
template <typename T, typename Op, unsigned Width>
void reduce(const unsigned char* in, unsigned char* out, unsigned active) {
  using A = typename accumulator<T>::type;
  A value[mh::kLanes];
  bool present[mh::kLanes];
  for (unsigned lane = 0; lane < mh::kLanes; ++lane) {
    present[lane] = active >> lane & 1;
    if (present[lane]) value[lane] = static_cast<A>(take<T>(in, lane));
  }
  for (unsigned distance = 1; distance < Width; distance *= 2) {
    for (unsigned lane = 0; lane < mh::kLanes; lane += 2 * distance) {
      const unsigned other = lane + distance;
      if (!present[other]) continue;
      value[lane] = present[lane] ? Op::apply(value[lane], value[other]) : value[other];
      present[lane] = true;
    }
  }
  for (unsigned lane = 0; lane < mh::kLanes; ++lane) {
    if (active >> lane & 1) put(out, lane, static_cast<T>(value[lane / Width * Width]));
  }
}

template <typename T, typename Op, bool Inclusive>
void prefix(const unsigned char* in, unsigned char* out, unsigned active) {
  using A = typename accumulator<T>::type;
  A running = static_cast<A>(is_same_v<Op, Product> ? 1 : 0);
  for (unsigned lane = 0; lane < mh::kLanes; ++lane) {
    if (!(active >> lane & 1)) continue;
    const A before = running;
    running = Op::apply(running, static_cast<A>(take<T>(in, lane)));
    put(out, lane, static_cast<T>(Inclusive ? running : before));
  }
}

template <typename T>
struct Shuffle {
  T value, otherwise;
  int from;  // a lane, or -1 for `otherwise`
};

template <typename T>
void shuffle(const unsigned char* in, unsigned char* out, unsigned active) {
  for (unsigned lane = 0; lane < mh::kLanes; ++lane) {
    if (!(active >> lane & 1)) continue;
    const Shuffle<T> wish = take<Shuffle<T>>(in, lane);
    T result = wish.otherwise;
    if (wish.from >= 0) {
      const unsigned from = static_cast<unsigned>(wish.from);
      if (from < mh::kLanes && (active >> from & 1)) {
        result = take<Shuffle<T>>(in, from).value;
      } else {
        __builtin_memset(&result, 0xff, sizeof(T));
        mh_inactive_lane(lane, from);
      }
    }
    put(out, lane, result);
  }
}
template <typename T>
inline T shuffle_from(T value, int from, T otherwise, const char* file, int line) {
  return collective<T>(Shuffle<T>{value, otherwise, from}, &shuffle<T>, file, line);
}
inline int lane() { return static_cast<int>(mh_lane()); }
inline void nothing(const unsigned char*, unsigned char*, unsigned) {}
inline unsigned active_mask(const char* file, int line) {
  return mh_collective(nullptr, nullptr, 0, 0, &nothing, file, line);
}

}  // namespace mh_detail

#define MH_REDUCTION(name, Op)                                                               \
  template <typename T, typename = mh_detail::lane_type<T>>                                  \
  inline T simd_##name(T data, MH_SITE) {                                                    \
    return mh_detail::collective<T>(                                                         \
        data, &mh_detail::reduce<T, mh_detail::Op, mh::kLanes>, file, line);                 \
  }                                                                                          \
  template <typename T, typename = mh_detail::lane_type<T>>                                  \
  inline T quad_##name(T data, MH_SITE) {                                                    \
    return mh_detail::collective<T>(data, &mh_detail::reduce<T, mh_detail::Op, 4>, file, line); \
  }
MH_REDUCTION(sum, Sum)
MH_REDUCTION(product, Product)
MH_REDUCTION(min, Min)
MH_REDUCTION(max, Max)
MH_REDUCTION(and, And)
MH_REDUCTION(or, Or)
MH_REDUCTION(xor, Xor)
#undef MH_REDUCTION

#define MH_PREFIX(name, Op, inclusive)                                                     \
  template <typename T, typename = mh_detail::lane_type<T>>                                \
  inline T simd_prefix_##name(T data, MH_SITE) {                                           \
    return mh_detail::collective<T>(                                                       \
        data, &mh_detail::prefix<T, mh_detail::Op, inclusive>, file, line);                \
  }
MH_PREFIX(inclusive_sum, Sum, true)
MH_PREFIX(exclusive_sum, Sum, false)
MH_PREFIX(inclusive_product, Product, true)
MH_PREFIX(exclusive_product, Product, false)
#undef MH_PREFIX

#define MH_LANE_FUNCTION template <typename T, typename = mh_detail::lane_type<T>> inline T
MH_LANE_FUNCTION simd_shuffle(T data, ushort from, MH_SITE) {
  return mh_detail::shuffle_from(data, from, data, file, line);
}
MH_LANE_FUNCTION simd_broadcast(T data, ushort from, MH_SITE) {
  return mh_detail::shuffle_from(data, from, data, file, line);
}
MH_LANE_FUNCTION simd_shuffle_xor(T data, ushort mask, MH_SITE) {
  return mh_detail::shuffle_from(data, mh_detail::lane() ^ mask, data, file, line);
}
// Past the end of the simdgroup a lane keeps its own value.
MH_LANE_FUNCTION simd_shuffle_down(T data, ushort delta, MH_SITE) {
  const int from = mh_detail::lane() + delta;
  return mh_detail::shuffle_from(data, from < 32 ? from : -1, data, file, line);
}
MH_LANE_FUNCTION simd_shuffle_up(T data, ushort delta, MH_SITE) {
  const int from = mh_detail::lane() - delta;
  return mh_detail::shuffle_from(data, from >= 0 ? from : -1, data, file, line);
}
MH_LANE_FUNCTION simd_shuffle_rotate_down(T data, ushort delta, MH_SITE) {
  return mh_detail::shuffle_from(data, (mh_detail::lane() + delta) % 32, data, file, line);
}
MH_LANE_FUNCTION simd_shuffle_rotate_up(T data, ushort delta, MH_SITE) {
  const int from = (mh_detail::lane() + 32 - delta % 32) % 32;
  return mh_detail::shuffle_from(data, from, data, file, line);
}
// The filling comes from the far end of the simdgroup: lane i takes filling[i + delta - 32], etc.
MH_LANE_FUNCTION simd_shuffle_and_fill_down(T data, T filling, ushort delta, MH_SITE) {
  const int lane = mh_detail::lane(), from = lane + delta;
  const T wrapped = mh_detail::shuffle_from(filling, from % 32, filling, file, line);
  return mh_detail::shuffle_from(data, from < 32 ? from : -1, wrapped, file, line);
}
MH_LANE_FUNCTION simd_shuffle_and_fill_up(T data, T filling, ushort delta, MH_SITE) {
  const int lane = mh_detail::lane(), from = lane - delta;
  const T wrapped = mh_detail::shuffle_from(filling, (from + 32) % 32, filling, file, line);
  return mh_detail::shuffle_from(data, from >= 0 ? from : -1, wrapped, file, line);
}
MH_LANE_FUNCTION quad_shuffle(T data, ushort from, MH_SITE) {
  return mh_detail::shuffle_from(data, mh_detail::lane() / 4 * 4 + from, data, file, line);
}
MH_LANE_FUNCTION quad_broadcast(T data, ushort from, MH_SITE) {
  return mh_detail::shuffle_from(data, mh_detail::lane() / 4 * 4 + from, data, file, line);
}
MH_LANE_FUNCTION quad_shuffle_xor(T data, ushort mask, MH_SITE) {
  return mh_detail::shuffle_from(data, mh_detail::lane() ^ (mask & 3), data, file, line);
}
MH_LANE_FUNCTION simd_broadcast_first(T data, MH_SITE) {
  const unsigned active = mh_detail::active_mask(file, line);
  return mh_detail::shuffle_from(data, __builtin_ctz(active), data, file, line);
}
#undef MH_LANE_FUNCTION

// The answer of a ballot.
struct simd_vote {
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t mask) : bits(mask) {}
  explicit constexpr operator vote_t() const { return bits; }
  constexpr bool all() const { return bits == 0xffffffffu; }
  constexpr bool any() const { return bits != 0; }

 private:
  vote_t bits;
};

inline simd_vote simd_active_threads_mask(MH_SITE) {
  return simd_vote(mh_detail::active_mask(file, line));
}
inline simd_vote simd_ballot(bool vote, MH_SITE) {
  const uint mine = vote ? 1u << mh_detail::lane() : 0u;
  return simd_vote(simd_or(mine, file, line));
}
inline bool simd_any(bool vote, MH_SITE) { return simd_or(uint(vote), file, line) != 0; }
inline bool simd_all(bool vote, MH_SITE) { return simd_and(uint(vote), file, line) != 0; }
inline bool simd_is_first(MH_SITE) {
  return __builtin_ctz(mh_detail::active_mask(file, line)) == mh_detail::lane();
}

}  // namespace metal
