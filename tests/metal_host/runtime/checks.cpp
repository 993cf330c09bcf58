// Watches every load and store of a kernel compiled with -fsanitize=thread: the compiler calls
// __tsan_* before each of them, and those functions are here instead of in a sanitizer's library.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace mh {
namespace {

// One access by one thread. `group` counts from 1; 0 is nobody.
struct Access {
  uint32_t group;
  uint16_t thread, simd_epoch;
  uint32_t epoch;
  uint32_t place;  // offset of the call in the kernel's image, times two, plus one if atomic
};

// What later accesses of a granule can be in conflict with. Of stores the last ones by two threads
// (several are in order only if atomic). Of loads since the barrier the first, one by another
// simdgroup than its, and the last ones by two threads: so that whoever stores next, one of these
// is somebody else's if any load is. And one load by an earlier threadgroup.
struct History {
  Access store, other_store, first_load, far_load, load, other_load, earlier_load;
};

enum Written : uint8_t { kUnwritten, kWritten, kReported };

struct Region {
  uintptr_t begin = 0, end = 0;
  bool is_input = false, is_threadgroup = false;
  unsigned granule = 1;
  const uint8_t* present = nullptr;
  std::vector<uint8_t> written;  // per byte one of Written; empty when all of it is initialised
  std::vector<History> history;     // per granule; empty for inputs
  uint64_t bytes_read = 0, bytes_written = 0;
};

Region g_regions[kRegions];
std::vector<Finding> g_findings;
Launch* g_launch = nullptr;
uint64_t g_steps = 0;

constexpr size_t kMaxFindings = 200;

Finding finding_here(Kind kind, const Fibre& fibre, const void* pc) {
  Finding finding = {};
  finding.kind = kind;
  finding.region = -1;
  finding.thread = fibre.thread.index_in_threadgroup;
  finding.group = fibre.group;
  finding.pc = reinterpret_cast<uint64_t>(pc);
  return finding;
}

void report_here(Kind kind, const void* pc) {
  Worker* worker = this_worker();
  if (g_launch && worker && worker->current) report(finding_here(kind, *worker->current, pc));
}

// A store of fewer bytes than a granule: keep the history per byte from here on.
void refine(Region& region) {
  std::vector<History> fine((region.end - region.begin) + 1);
  for (size_t i = 0; i < region.history.size() * region.granule && i < fine.size(); ++i) {
    fine[i] = region.history[i / region.granule];
  }
  region.history.swap(fine);
  region.granule = 1;
}

struct Now {
  Access access;
  bool is_threadgroup;
};

Now now(const Region& region, const Fibre& fibre, const Worker& worker, const void* pc,
        bool atomic) {
  const unsigned simdgroup = fibre.thread.simdgroup_index_in_threadgroup;
  const Epochs& epochs = worker.epochs;
  const auto image = reinterpret_cast<uintptr_t>(g_launch->image);
  const auto offset = reinterpret_cast<uintptr_t>(pc) - image;
  Access access;
  access.group = fibre.group + 1;
  access.thread = static_cast<uint16_t>(fibre.thread.index_in_threadgroup);
  access.epoch = region.is_threadgroup ? epochs.threadgroup : epochs.device;
  access.simd_epoch =
      region.is_threadgroup ? epochs.simd_threadgroup[simdgroup] : epochs.simd_device[simdgroup];
  access.place = static_cast<uint32_t>(offset * 2 + atomic);
  return {access, region.is_threadgroup};
}

// Whether nothing orders the two, and how bad that is.
bool conflict(const Now& now, const Access& before, Kind* kind) {
  const Access& mine = now.access;
  if (before.group == 0 || (before.place & 1 & mine.place)) return false;
  if (before.group != mine.group) {
    *kind = kRaceAcrossThreadgroups;
    return !now.is_threadgroup;
  }
  if (before.thread == mine.thread || before.epoch != mine.epoch) return false;
  const bool same_simdgroup = before.thread / kLanes == mine.thread / kLanes;
  if (same_simdgroup && before.simd_epoch != mine.simd_epoch) return false;
  *kind = same_simdgroup ? kLaneOrder : kRace;
  return true;
}

Finding race(Finding finding, Kind kind, const Access& before, bool before_is_write) {
  finding.kind = kind;
  finding.other_is_write = before_is_write;
  finding.other_thread = before.thread;
  finding.other_group = before.group - 1;
  finding.other_pc = reinterpret_cast<uint64_t>(g_launch->image) + before.place / 2;
  return finding;
}

void note_load(History& history, const Access& mine) {
  const Access& first = history.first_load;
  if (first.group != mine.group || first.epoch != mine.epoch) {
    if (first.group && first.group != mine.group) history.earlier_load = first;
    history.first_load = history.load = mine;
    history.far_load.group = history.other_load.group = 0;
    return;
  }
  if (first.thread / kLanes != mine.thread / kLanes) history.far_load = mine;
  if (history.load.thread != mine.thread) history.other_load = history.load;
  history.load = mine;
}

void check_order(Region& region, Fibre& fibre, const Now& now, uintptr_t address, size_t bytes,
                 bool write, const Finding& finding) {
  if (region.history.empty()) return;
  if (write && bytes < region.granule) refine(region);
  const size_t first = (address - region.begin) / region.granule;
  const size_t last = (address - region.begin + bytes - 1) / region.granule;
  bool reported = false;
  for (size_t i = first; i <= last; ++i) {
    History& history = region.history[i];
    Kind kind;
    const Access* store = conflict(now, history.store, &kind)         ? &history.store
                          : conflict(now, history.other_store, &kind) ? &history.other_store
                                                                      : nullptr;
    if (store && !reported) {
      const Finding found = race(finding, kind, *store, true);
      reported = true;
      if (write && bytes <= sizeof(fibre.pending.before)) {
        fibre.pending.address = reinterpret_cast<void*>(address);
        fibre.pending.bytes = static_cast<uint32_t>(bytes);
        std::memcpy(fibre.pending.before, fibre.pending.address, bytes);
        fibre.pending.finding = found;
      } else {
        report(found);
      }
    }
    if (!write) {
      note_load(history, now.access);
      continue;
    }
    for (const Access* load : {&history.first_load, &history.far_load, &history.load,
                               &history.other_load, &history.earlier_load}) {
      if (!conflict(now, *load, &kind)) continue;
      fibre.pending.address = nullptr;
      report(race(finding, kind, *load, false));
    }
    if (history.store.thread != now.access.thread || history.store.group != now.access.group) {
      history.other_store = history.store;
    }
    history.store = now.access;
  }
}

enum Touch { kLoads, kStores, kUpdates };

void touch(uintptr_t address, size_t bytes, Touch what, const void* pc, bool atomic = false) {
  unsigned index;
  if (!within_arena(address, &index)) return;  // a thread's own memory
  Worker* worker = this_worker();
  if (!g_launch || !worker || !worker->current) return;
  Fibre& fibre = *worker->current;
  if (fibre.pending.address) checks_settle(fibre);
  if (++g_steps > g_launch->step_limit) {
    g_launch->ran_away = 1;
    worker->wait(State::kDone, pc);
  }
  Region& region = g_regions[index];
  Finding finding = finding_here(kOutOfBounds, fibre, pc);
  finding.region = static_cast<int32_t>(index);
  finding.bytes = static_cast<uint32_t>(bytes);
  finding.is_write = what != kLoads;
  finding.offset = static_cast<int64_t>(address - region_start(index));
  if (address < region.begin || address + bytes > region.end) {
    report(finding);
    make_accessible(address, bytes);
    return;
  }
  const size_t offset = address - region.begin;
  if (region.present && std::memchr(region.present + offset, 0, bytes)) report(finding);
  if (what != kStores) region.bytes_read += bytes;
  if (what != kLoads) region.bytes_written += bytes;
  if (what != kLoads && region.is_input) {
    finding.kind = kWriteToInput;
    report(finding);
    return;
  }
  if (!region.written.empty()) {
    uint8_t* written = region.written.data() + offset;
    if (what == kStores) {
      std::memset(written, kWritten, bytes);
    } else if (auto* hole = static_cast<uint8_t*>(std::memchr(written, 0, bytes))) {
      Finding uninitialised = finding;
      uninitialised.kind = kUninitialised;
      uninitialised.is_write = 0;
      uninitialised.offset += hole - written;
      report(uninitialised);
      std::replace(written, written + bytes, uint8_t(kUnwritten), uint8_t(kReported));
    }
  }
  check_order(region, fibre, now(region, fibre, *worker, pc, atomic), address, bytes,
              what != kLoads, finding);
}

}  // namespace

void report(const Finding& finding) {
  for (Finding& known : g_findings) {
    if (known.kind == finding.kind && known.region == finding.region && known.pc == finding.pc &&
        known.other_pc == finding.other_pc) {
      ++known.count;
      return;
    }
  }
  if (g_findings.size() == kMaxFindings) return;
  g_findings.push_back(finding);
  g_findings.back().count = 1;
}

void checks_settle(Fibre& fibre) {
  PendingStore& pending = fibre.pending;
  if (!pending.address) return;
  if (std::memcmp(pending.address, pending.before, pending.bytes) == 0) {
    pending.finding.kind = kSameValue;
  }
  report(pending.finding);
  pending.address = nullptr;
}

void checks_open(Launch& launch, void* const* addresses) {
  g_findings.clear();
  g_steps = 0;
  g_launch = &launch;
  for (uint32_t i = 0; i < launch.buffer_count; ++i) {
    const BufferArgument& buffer = launch.buffers[i];
    Region& region = g_regions[i] = Region();
    region.begin = reinterpret_cast<uintptr_t>(addresses[i]);
    region.end = region.begin + buffer.bytes;
    region.is_input = !buffer.is_output;
    region.present = buffer.present;
    if (region.is_input) continue;
    region.granule = buffer.element;
    region.history.resize(buffer.bytes / buffer.element + 1);
    if (!buffer.initialised) region.written.resize(buffer.bytes);
  }
  for (auto* d = launch.declarations; d; d = d->next) {
    Region& region = g_regions[kFirstThreadgroupRegion + d->id] = Region();
    region.begin = reinterpret_cast<uintptr_t>(threadgroup_region(d->id));
    region.end = region.begin + d->bytes;
    region.is_threadgroup = true;
    region.granule = d->granule;
    region.history.resize(d->bytes / d->granule + 1);
    region.written.resize(d->bytes);
  }
}

void checks_new_threadgroup() {
  for (auto* d = g_launch->declarations; d; d = d->next) {
    auto& written = g_regions[kFirstThreadgroupRegion + d->id].written;
    std::fill(written.begin(), written.end(), kUnwritten);
  }
}

void checks_close(Launch& launch) {
  for (uint32_t i = 0; i < launch.buffer_count; ++i) {
    BufferArgument& buffer = launch.buffers[i];
    const Region& region = g_regions[i];
    buffer.read = region.bytes_read;
    buffer.written = region.bytes_written;
    buffer.unwritten = 0;
    for (size_t byte = 0; byte < region.written.size(); ++byte) {
      if (region.written[byte] == kWritten) continue;
      if (buffer.unwritten++ == 0) buffer.first_unwritten = byte;
    }
  }
  for (Region& region : g_regions) region = Region();
  g_launch = nullptr;
}

}  // namespace mh

using namespace mh;

extern "C" {

#define MH_CALLER __builtin_return_address(0)
#define MH_ADDRESS reinterpret_cast<uintptr_t>(address)
#define MH_SIZED(bytes)                                                                           \
  void __tsan_read##bytes(void* address) { touch(MH_ADDRESS, bytes, kLoads, MH_CALLER); }         \
  void __tsan_write##bytes(void* address) { touch(MH_ADDRESS, bytes, kStores, MH_CALLER); }       \
  void __tsan_unaligned_read##bytes(void* address) {                                              \
    touch(MH_ADDRESS, bytes, kLoads, MH_CALLER);                                                  \
  }                                                                                               \
  void __tsan_unaligned_write##bytes(void* address) {                                             \
    touch(MH_ADDRESS, bytes, kStores, MH_CALLER);                                                 \
  }
MH_SIZED(1)
MH_SIZED(2)
MH_SIZED(4)
MH_SIZED(8)
MH_SIZED(16)
void __tsan_read_range(void* address, unsigned long bytes) {
  touch(MH_ADDRESS, bytes, kLoads, MH_CALLER);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  touch(MH_ADDRESS, bytes, kStores, MH_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment, bounds, shift, ...: what the compiler knows and the hardware would not say.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, what;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  unsigned index;
  if (!within_arena(address, &index) || !g_launch) return;
  Worker* worker = this_worker();
  if (!worker || !worker->current) return;
  Finding finding = finding_here(kMisaligned, *worker->current, MH_CALLER);
  finding.region = static_cast<int32_t>(index);
  finding.offset = static_cast<int64_t>(address - region_start(index));
  finding.bytes = 1u << data->log_alignment;
  report(finding);
}
void __ubsan_handle_out_of_bounds(void*, uintptr_t) { report_here(kLocalBounds, MH_CALLER); }
void __ubsan_handle_shift_out_of_bounds(void*, uintptr_t, uintptr_t) {
  report_here(kBadShift, MH_CALLER);
}
void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
  report_here(kDivisionByZero, MH_CALLER);
}
#define MH_OVERFLOW(name)                                            \
  void __ubsan_handle_##name##_overflow(void*, uintptr_t, uintptr_t) { \
    report_here(kIntegerOverflow, MH_CALLER);                        \
  }
MH_OVERFLOW(add)
MH_OVERFLOW(sub)
MH_OVERFLOW(mul)
void __ubsan_handle_negate_overflow(void*, uintptr_t) { report_here(kIntegerOverflow, MH_CALLER); }

void mh_inactive_lane(unsigned, unsigned) {
  Worker* worker = this_worker();
  if (g_launch && worker && worker->current) {
    report(finding_here(kInactiveLane, *worker->current, worker->current->pc));
  }
}

void mh_atomic(const volatile void* target, unsigned bytes, int kind, const void* pc) {
  const Touch what = kind == kAtomicLoad ? kLoads : kind == kAtomicStore ? kStores : kUpdates;
  touch(reinterpret_cast<uintptr_t>(target), bytes, what, pc, true);
}

unsigned mh_findings(const Finding** findings) {
  *findings = g_findings.data();
  return static_cast<unsigned>(g_findings.size());
}
}
