// Inside the runtime: threads as fibres, a worker that runs threadgroups, and what the checks need.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "mh_abi.h"

namespace mh {

enum class Schedule : uint32_t { kForward, kReverse, kRandom };

// Shared with executor.py, field by field.
struct BufferArgument {
  void* data;
  uint64_t bytes;
  uint32_t element;      // bytes of one element
  uint32_t residue;      // address modulo 16 in MLX
  uint32_t is_output;
  uint32_t initialised;  // an output with an init_value
  const uint8_t* present;  // per byte, for a view with gaps; may be null
  uint64_t read, written, unwritten, first_unwritten;
};
using Entry = void (*)(void* const* buffers, const Thread& thread);
struct Launch {
  Entry entry;
  const Declaration* declarations;
  const void* image;
  BufferArgument* buffers;
  uint32_t buffer_count;
  uint32_t grid[3], threadgroup[3];
  uint32_t schedule, check, workers;
  uint64_t seed, step_limit;
  uint64_t threadgroups, barriers, collectives;
  uint64_t fault_address, fault_pc;
  uint32_t faulted, ran_away, stack_overflow;
};
struct Finding {
  uint32_t kind;
  int32_t region;  // buffer, or kFirstThreadgroupRegion + id, or -1
  int64_t offset;  // bytes from the region's start
  uint32_t bytes, is_write, other_is_write;
  uint32_t thread, group, other_thread, other_group;
  uint64_t pc, other_pc;
  uint64_t count;
};
enum Kind : uint32_t {
  kOutOfBounds,
  kUninitialised,
  kWriteToInput,
  kRace,
  kRaceAcrossThreadgroups,
  kLaneOrder,
  kSameValue,
  kBarrierDivergence,
  kReturnBeforeBarrier,
  kSimdDivergence,
  kInactiveLane,
  kMisaligned,
  kLocalBounds,
  kBadShift,
  kIntegerOverflow,
  kDivisionByZero,
};

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBuffers = 96;  // 31 slots, and room for what lies over it
constexpr unsigned kFirstThreadgroupRegion = kMaxBuffers;
constexpr unsigned kRegions = 128;

enum class State : uint8_t { kReady, kBarrier, kSimdBarrier, kCollective, kDone };

// Which call a thread waits in. With checks by its address, so that two on one line differ;
// without, by its line, because an optimised kernel may have one call at several addresses.
struct Site {
  const char* file;
  int line;
  Combine combine;
  const void* pc;
  bool operator==(const Site& other) const {
    return file == other.file && line == other.line && combine == other.combine && pc == other.pc;
  }
};

// A store over another thread's value, decided once it has happened: the same value is no race.
struct PendingStore {
  void* address = nullptr;
  uint32_t bytes = 0;
  unsigned char before[16];
  Finding finding;
};

struct Fibre {
  void* stack_pointer;
  State state;
  uint32_t flags;
  Thread thread;
  uint32_t group;
  Site site;
  const void* pc;
  void* out;
  uint32_t bytes_in, bytes_out, active;
  alignas(16) unsigned char in[kPayload];
  PendingStore pending;
};

// Counts barriers: accesses of two threads with one between them are in order.
struct Epochs {
  uint32_t threadgroup = 1, device = 1;
  uint16_t simd_threadgroup[kLanes] = {}, simd_device[kLanes] = {};
};

struct Worker {
  explicit Worker(Launch& launch, void* const* buffers);
  ~Worker();
  void run_group(uint32_t group);

  Launch& launch;
  void* const* buffers;
  Fibre* current = nullptr;
  void* scheduler = nullptr;
  uint64_t barriers = 0, collectives = 0, random;
  Epochs epochs;
  sigjmp_buf escape;
  std::vector<unsigned char*> threadgroup_memory;

  Site site(const char* file, int line, Combine combine, const void* pc) const {
    return {file, line, combine, launch.check ? pc : nullptr};
  }
  void wait(State state, const void* pc);
  bool owns_stack(const void* address) const;

 private:
  void start(uint32_t group);
  void run_lane(Fibre& fibre);
  bool advance(unsigned simdgroup);
  void release_lanes(unsigned simdgroup);
  void release_barrier();
  unsigned pick(unsigned count);
  void report_divergence(Kind kind, const Fibre& fibre, const Fibre& other);

  std::vector<Fibre> fibres_;
  unsigned count_ = 0;
  unsigned char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
};

Worker* this_worker();

// memory.cpp: where buffers lie. Every region has gigabytes of nothing before and after it.
void memory_open(Launch& launch, void** addresses);
void memory_close(Launch& launch);
unsigned char* threadgroup_region(unsigned id);
uintptr_t region_start(unsigned region);
bool within_arena(uintptr_t address, unsigned* region);
void make_accessible(uintptr_t address, size_t bytes);

// checks.cpp
void checks_open(Launch& launch, void* const* addresses);
void checks_close(Launch& launch);
void checks_new_threadgroup();
void checks_settle(Fibre& fibre);  // decides a pending store
void report(const Finding& finding);

}  // namespace mh
