// What a compiled kernel and the runtime know of each other. Plain C types: both sides include it,
// the kernel inside the Metal shim (no system headers), the runtime inside ordinary C++.
#pragma once

namespace mh {

constexpr unsigned kLanes = 32;
constexpr unsigned kPayload = 96;  // the widest value a collective operation takes from one lane

struct Size3 {
  unsigned x, y, z;
};
inline unsigned quads(const Size3& threads) { return (threads.x * threads.y * threads.z + 3) / 4; }

// Everything a thread attribute of a kernel can ask for.
struct Thread {
  Size3 position_in_grid, position_in_threadgroup, threadgroup_position_in_grid;
  Size3 threads_per_grid, threadgroups_per_grid;
  Size3 threads_per_threadgroup;           // smaller in the last threadgroup of a row
  Size3 dispatch_threads_per_threadgroup;  // as dispatched
  unsigned index_in_threadgroup, index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
};

// One `threadgroup T x[N];` of a kernel.
struct Declaration {
  unsigned id;
  unsigned long bytes;
  unsigned granule;  // bytes of one scalar
  const Declaration* next;
};

// Combines what the active lanes brought; `in` and `out` are [32][kPayload].
using Combine = void (*)(const unsigned char* in, unsigned char* out, unsigned active);

enum AtomicKind { kAtomicLoad, kAtomicStore, kAtomicUpdate };

}  // namespace mh

extern "C" {
void mh_threadgroup_barrier(unsigned flags, const char* file, int line);
void mh_simdgroup_barrier(unsigned flags, const char* file, int line);
// Waits for the other lanes of the simdgroup; returns the active lanes.
unsigned mh_collective(const void* in, void* out, unsigned bytes_in, unsigned bytes_out,
                       mh::Combine combine, const char* file, int line);
void mh_inactive_lane(unsigned reader, unsigned source);  // undefined: nobody is there to read
void* mh_threadgroup_memory(unsigned id);
void mh_atomic(const volatile void* address, unsigned bytes, int order, const void* pc);
unsigned mh_lane();
}
