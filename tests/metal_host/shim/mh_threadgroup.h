// `threadgroup T x[N];` becomes `T (&x)[N] = mh::threadgroup_memory<T[N], id>();`: the same array
// for all threads of a threadgroup, known to the runtime by its id.
#pragma once

#include "mh_abi.h"
#include "mh_atomic.h"
#include "mh_vec.h"

namespace mh {

template <typename T>
struct granule : metal::integral_constant<unsigned, sizeof(T)> {};
template <typename T, size_t N>
struct granule<T[N]> : granule<T> {};
template <typename T, int N>
struct granule<metal::vec<T, N>> : granule<T> {};

static const Declaration* declarations = nullptr;

// Registered when the kernel is loaded: what a branch never reached declares counts too.
template <typename T, unsigned Id>
struct Registered {
  static Declaration record;
  static const Declaration* add() {
    record.next = declarations;
    return declarations = &record;
  }
  static const Declaration* done;
};
template <typename T, unsigned Id>
Declaration Registered<T, Id>::record = {Id, sizeof(T), granule<T>::value, nullptr};
template <typename T, unsigned Id>
const Declaration* Registered<T, Id>::done = Registered<T, Id>::add();

template <typename T, unsigned Id>
inline T& threadgroup_memory() {
  static_cast<void>(*const_cast<const Declaration* volatile*>(&Registered<T, Id>::done));
  return *static_cast<T*>(mh_threadgroup_memory(Id));
}

}  // namespace mh
