// Atomic operations, relaxed as in Metal. Threads change only at barriers and collectives, so plain
// reads and writes are atomic here; the runtime is told, for its checks and counts.
#pragma once

#include "mh_abi.h"
#include "mh_math.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> ||
                    is_same_v<T, bool> || is_same_v<T, ulong>,
                "atomics exist for int, uint, float, bool and ulong");
  T mh_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

#define MH_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define MH_CALLER __builtin_return_address(0)

template <typename T>
MH_UNSEEN T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  mh_atomic(&object->mh_value, sizeof(T), mh::kAtomicLoad, MH_CALLER);
  return object->mh_value;
}
template <typename T, typename U>
MH_UNSEEN void atomic_store_explicit(volatile atomic<T>* object, U desired, memory_order) {
  mh_atomic(&object->mh_value, sizeof(T), mh::kAtomicStore, MH_CALLER);
  object->mh_value = static_cast<T>(desired);
}
#define MH_ATOMIC_UPDATE(name, computed)                                                    \
  template <typename T, typename U>                                                         \
  MH_UNSEEN T atomic_##name##_explicit(volatile atomic<T>* object, U operand, memory_order) { \
    mh_atomic(&object->mh_value, sizeof(T), mh::kAtomicUpdate, MH_CALLER);                   \
    const T old = object->mh_value, other = static_cast<T>(operand);                        \
    object->mh_value = static_cast<T>(computed);                                            \
    return old;                                                                             \
  }
MH_ATOMIC_UPDATE(exchange, other)
MH_ATOMIC_UPDATE(fetch_add, old + other)
MH_ATOMIC_UPDATE(fetch_sub, old - other)
MH_ATOMIC_UPDATE(fetch_min, min(old, other))
MH_ATOMIC_UPDATE(fetch_max, max(old, other))
MH_ATOMIC_UPDATE(fetch_and, old& other)
MH_ATOMIC_UPDATE(fetch_or, old | other)
MH_ATOMIC_UPDATE(fetch_xor, old ^ other)
#undef MH_ATOMIC_UPDATE

template <typename T>
MH_UNSEEN bool atomic_compare_exchange_weak_explicit(
    volatile atomic<T>* object, T* expected, T desired, memory_order, memory_order) {
  mh_atomic(&object->mh_value, sizeof(T), mh::kAtomicUpdate, MH_CALLER);
  const T old = object->mh_value;
  const bool same = __builtin_memcmp(&old, expected, sizeof(T)) == 0;
  if (same) {
    object->mh_value = desired;
  } else {
    *expected = old;
  }
  return same;
}
#undef MH_UNSEEN
#undef MH_CALLER

}  // namespace metal
