// Where buffers lie: each alone in a slot of an arena that is reserved and inaccessible, so that no
// wrong index of one reaches another.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace mh {
namespace {

constexpr size_t kPage = 4096;
unsigned g_shift = 0;
uintptr_t g_arena = 0;

size_t round_up(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void reserve_arena() {
  if (g_arena) return;
  for (g_shift = 33; g_shift >= 28; --g_shift) {  // 8 GiB a slot, less where that is refused
    void* arena = mmap(nullptr, size_t(kRegions) << g_shift, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) continue;
    g_arena = reinterpret_cast<uintptr_t>(arena);
    return;
  }
  std::fprintf(stderr, "metal host: no address space for the buffers\n");
  std::abort();
}

uintptr_t middle(unsigned region) {
  return g_arena + (uintptr_t(region) << g_shift) + (uintptr_t(1) << (g_shift - 1));
}

// The end of the data is as near to the inaccessible page after it as its alignment allows.
uintptr_t place(unsigned region, size_t bytes, unsigned residue) {
  uintptr_t start = middle(region) - bytes;
  start -= start % 16;
  return residue ? start - 16 + residue : start;
}

uintptr_t g_starts[kRegions];

unsigned char* open_region(unsigned region, size_t bytes, unsigned residue) {
  const uintptr_t start = place(region, bytes, residue);
  const uintptr_t page = start / kPage * kPage;
  void* got = mmap(reinterpret_cast<void*>(page), round_up(middle(region) - page),
                   PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (got == MAP_FAILED) {
    std::fprintf(stderr, "metal host: no memory for a buffer of %zu bytes\n", bytes);
    std::abort();
  }
  std::memset(got, 0xff, middle(region) - page);
  g_starts[region] = start;
  return reinterpret_cast<unsigned char*>(start);
}

void close_region(unsigned region) {
  if (!g_starts[region]) return;
  const uintptr_t slot = g_arena + (uintptr_t(region) << g_shift);
  mmap(reinterpret_cast<void*>(slot), size_t(1) << g_shift, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  g_starts[region] = 0;
}

}  // namespace

void memory_open(Launch& launch, void** addresses) {
  reserve_arena();
  for (uint32_t i = 0; i < launch.buffer_count; ++i) {
    BufferArgument& buffer = launch.buffers[i];
    unsigned char* start = open_region(i, std::max<size_t>(buffer.bytes, 16), buffer.residue);
    if (!buffer.is_output || buffer.initialised) std::memcpy(start, buffer.data, buffer.bytes);
    addresses[i] = start;
    if (!buffer.is_output && !launch.check) {  // without checks, a store to an input is a fault
      const uintptr_t page = reinterpret_cast<uintptr_t>(start) / kPage * kPage;
      mprotect(reinterpret_cast<void*>(page), middle(i) - page, PROT_READ);
    }
  }
  if (!launch.check) return;
  for (auto* d = launch.declarations; d; d = d->next) {
    open_region(kFirstThreadgroupRegion + d->id, d->bytes, 0);
  }
}

void memory_close(Launch& launch) {
  for (uint32_t i = 0; i < launch.buffer_count; ++i) {
    BufferArgument& buffer = launch.buffers[i];
    if (buffer.is_output) {
      std::memcpy(buffer.data, reinterpret_cast<void*>(g_starts[i]), buffer.bytes);
    }
  }
  for (unsigned region = 0; region < kRegions; ++region) close_region(region);
}

unsigned char* threadgroup_region(unsigned id) {
  return reinterpret_cast<unsigned char*>(g_starts[kFirstThreadgroupRegion + id]);
}

uintptr_t region_start(unsigned region) { return g_starts[region]; }

bool within_arena(uintptr_t address, unsigned* region) {
  const uintptr_t offset = address - g_arena;
  if (offset >= (uintptr_t(kRegions) << g_shift)) return false;
  *region = static_cast<unsigned>(offset >> g_shift);
  return true;
}

void make_accessible(uintptr_t address, size_t bytes) {
  const uintptr_t page = address / kPage * kPage;
  const size_t size = round_up(address + bytes - page);
  mprotect(reinterpret_cast<void*>(page), size, PROT_READ | PROT_WRITE);
}

}  // namespace mh
