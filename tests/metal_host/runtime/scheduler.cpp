// Runs threadgroups. A Metal thread is a fibre: it runs until it waits for others, at a barrier or
// a collective operation of its simdgroup, and the scheduler decides who goes on.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

#ifndef __x86_64__
#error "fibres are switched by x86-64 assembly"
#endif

// Saves what a function must preserve, changes stacks, and restores.
extern "C" void mh_switch(void** save, void* restore);
asm(R"(
.text
.globl mh_switch
.type mh_switch, @function
mh_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mh_switch, .-mh_switch
)");

namespace mh {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 * 1024;  // with an inaccessible page below it

thread_local Worker* t_worker = nullptr;

void run_thread() {
  Worker& worker = *t_worker;
  Fibre& fibre = *worker.current;
  worker.launch.entry(worker.buffers, fibre.thread);
  worker.wait(State::kDone, nullptr);
  __builtin_unreachable();
}

Size3 size3(const uint32_t* values) { return {values[0], values[1], values[2]}; }

}  // namespace

Worker* this_worker() { return t_worker; }

Worker::Worker(Launch& owner, void* const* addresses)
    : launch(owner), buffers(addresses), random(owner.seed * 2 + 1) {
  const unsigned threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2];
  fibres_.resize(threads);
  stacks_bytes_ = threads * kStack;
  stacks_ = static_cast<unsigned char*>(mmap(nullptr, stacks_bytes_, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < threads; ++i) mprotect(stacks_ + i * kStack, kPage, PROT_NONE);
  unsigned count = 0;
  for (auto* d = launch.declarations; d; d = d->next) count = d->id + 1 > count ? d->id + 1 : count;
  threadgroup_memory.resize(count);
  for (auto* d = launch.declarations; d; d = d->next) {
    threadgroup_memory[d->id] =
        launch.check ? threadgroup_region(d->id)
                     : static_cast<unsigned char*>(aligned_alloc(64, (d->bytes + 63) / 64 * 64));
  }
  t_worker = this;
}

Worker::~Worker() {
  if (!launch.check) {
    for (auto* memory : threadgroup_memory) free(memory);
  }
  munmap(stacks_, stacks_bytes_);
  t_worker = nullptr;
}

bool Worker::owns_stack(const void* address) const {
  return address >= stacks_ && address < stacks_ + stacks_bytes_;
}

unsigned Worker::pick(unsigned count) {
  switch (static_cast<Schedule>(launch.schedule)) {
    case Schedule::kForward: return 0;
    case Schedule::kReverse: return count - 1;
    case Schedule::kRandom: break;
  }
  random = random * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<unsigned>((random >> 33) % count);
}

void Worker::start(uint32_t group) {
  const uint32_t* grid = launch.grid;
  const uint32_t* nominal = launch.threadgroup;
  uint32_t groups[3], at[3], here[3];
  uint32_t rest = group;
  for (int i = 0; i < 3; ++i) {
    groups[i] = (grid[i] + nominal[i] - 1) / nominal[i];
    at[i] = rest % groups[i];
    rest /= groups[i];
    here[i] = std::min(nominal[i], grid[i] - at[i] * nominal[i]);  // smaller at the grid's edge
  }
  count_ = here[0] * here[1] * here[2];
  epochs = Epochs();
  for (unsigned i = 0; i < count_; ++i) {
    Fibre& fibre = fibres_[i];
    fibre.state = State::kReady;
    fibre.group = group;
    fibre.pending.address = nullptr;
    Thread& t = fibre.thread;
    t.position_in_threadgroup = {i % here[0], i / here[0] % here[1], i / here[0] / here[1]};
    t.threadgroup_position_in_grid = size3(at);
    t.position_in_grid = {at[0] * nominal[0] + t.position_in_threadgroup.x,
                          at[1] * nominal[1] + t.position_in_threadgroup.y,
                          at[2] * nominal[2] + t.position_in_threadgroup.z};
    t.threads_per_grid = size3(grid);
    t.threadgroups_per_grid = size3(groups);
    t.threads_per_threadgroup = size3(here);
    t.dispatch_threads_per_threadgroup = size3(nominal);
    t.index_in_threadgroup = i;
    t.index_in_simdgroup = i % kLanes;
    t.simdgroup_index_in_threadgroup = i / kLanes;
    t.simdgroups_per_threadgroup = (count_ + kLanes - 1) / kLanes;
    t.dispatch_simdgroups_per_threadgroup =
        (nominal[0] * nominal[1] * nominal[2] + kLanes - 1) / kLanes;
    // Six registers and the address that mh_switch returns to; the stack is as after a call.
    // Stacks begin at different places in their pages: at one they would share a few cache lines.
    const size_t stagger = i * 13 % 64 * 64;
    auto* top = reinterpret_cast<void**>(stacks_ + (i + 1) * kStack - stagger) - 2;
    *top = reinterpret_cast<void*>(&run_thread);
    fibre.stack_pointer = top - 6;
    std::memset(top - 6, 0, 6 * sizeof(void*));
  }
  for (auto* d = launch.declarations; d; d = d->next) {
    std::memset(threadgroup_memory[d->id], 0xff, d->bytes);  // NaN in every float type
  }
  if (launch.check) checks_new_threadgroup();
}

void Worker::run_lane(Fibre& fibre) {
  current = &fibre;
  mh_switch(&scheduler, fibre.stack_pointer);
  current = nullptr;
}

void Worker::wait(State state, const void* pc) {
  Fibre& fibre = *current;
  if (launch.check) checks_settle(fibre);
  fibre.state = state;
  fibre.pc = pc;
  mh_switch(&fibre.stack_pointer, scheduler);
}

void Worker::report_divergence(Kind kind, const Fibre& fibre, const Fibre& other) {
  if (!launch.check) return;
  Finding finding = {};
  finding.kind = kind;
  finding.region = -1;
  finding.thread = fibre.thread.index_in_threadgroup;
  finding.other_thread = other.thread.index_in_threadgroup;
  finding.group = finding.other_group = fibre.group;
  finding.pc = reinterpret_cast<uint64_t>(fibre.pc);
  finding.other_pc = reinterpret_cast<uint64_t>(other.pc);
  report(finding);
}

// Lets the lanes of a simdgroup run until each waits for somebody, then serves one operation.
// False when all of them wait at a threadgroup barrier or have returned.
bool Worker::advance(unsigned simdgroup) {
  const unsigned first = simdgroup * kLanes, end = std::min(count_, first + kLanes);
  unsigned ready[kLanes], waiting = 0, count = 0;
  const bool reverse = launch.schedule == static_cast<uint32_t>(Schedule::kReverse);
  for (unsigned k = first; k < end; ++k) {
    const unsigned i = reverse ? first + end - 1 - k : k;
    if (fibres_[i].state == State::kReady) ready[count++] = i;
  }
  for (unsigned done = 0; done < count; ++done) {
    if (launch.schedule == static_cast<uint32_t>(Schedule::kRandom)) {
      std::swap(ready[done], ready[done + pick(count - done)]);
    }
    run_lane(fibres_[ready[done]]);
    if (launch.ran_away) return false;
  }
  for (unsigned i = first; i < end; ++i) {
    const State state = fibres_[i].state;
    waiting += state == State::kCollective || state == State::kSimdBarrier;
  }
  if (waiting) release_lanes(simdgroup);
  if (barriers + collectives > launch.step_limit) launch.ran_away = 1;
  return waiting && !launch.ran_away;
}

// Where lanes wait at different places, the earliest line goes first: so branches join again.
void Worker::release_lanes(unsigned simdgroup) {
  const unsigned first = simdgroup * kLanes, end = std::min(count_, first + kLanes);
  const Fibre* leader = nullptr;
  for (unsigned i = first; i < end; ++i) {
    const Fibre& fibre = fibres_[i];
    if (fibre.state != State::kCollective && fibre.state != State::kSimdBarrier) continue;
    if (!leader || fibre.site.line < leader->site.line) leader = &fibre;
  }
  const Site site = leader->site;
  unsigned active = 0;
  const Fibre* absent = nullptr;
  for (unsigned i = first; i < end; ++i) {
    const Fibre& fibre = fibres_[i];
    if (fibre.state == leader->state && fibre.site == site) {
      active |= 1u << (i - first);
    } else if (fibre.state != State::kDone) {
      absent = &fibre;
    }
  }
  if (absent) report_divergence(kSimdDivergence, *leader, *absent);

  if (leader->state == State::kSimdBarrier) {
    if (leader->flags & 1) ++epochs.simd_device[simdgroup];
    if (leader->flags & 2) ++epochs.simd_threadgroup[simdgroup];
  } else {
    ++collectives;
    alignas(16) static thread_local unsigned char in[kLanes][kPayload], out[kLanes][kPayload];
    for (unsigned i = first; i < end; ++i) {
      if (active >> (i - first) & 1) std::memcpy(in[i - first], fibres_[i].in, fibres_[i].bytes_in);
    }
    t_worker->current = const_cast<Fibre*>(leader);  // whom a finding in here is about
    site.combine(in[0], out[0], active);
    t_worker->current = nullptr;
    for (unsigned i = first; i < end; ++i) {
      Fibre& fibre = fibres_[i];
      if (!(active >> (i - first) & 1)) continue;
      if (fibre.bytes_out) std::memcpy(fibre.out, out[i - first], fibre.bytes_out);
      fibre.active = active;
    }
  }
  for (unsigned i = first; i < end; ++i) {
    if (active >> (i - first) & 1) fibres_[i].state = State::kReady;
  }
}

void Worker::release_barrier() {
  ++barriers;
  const Fibre* leader = nullptr;
  uint32_t flags = ~0u;
  for (unsigned i = 0; i < count_; ++i) {
    if (fibres_[i].state != State::kBarrier) continue;
    if (!leader) leader = &fibres_[i];
    flags &= fibres_[i].flags;
  }
  for (unsigned i = 0; i < count_; ++i) {
    Fibre& fibre = fibres_[i];
    if (fibre.state == State::kDone) {
      report_divergence(kReturnBeforeBarrier, *leader, fibre);
    } else if (!(fibre.site == leader->site)) {
      report_divergence(kBarrierDivergence, *leader, fibre);
    }
    if (fibre.state == State::kBarrier) fibre.state = State::kReady;
  }
  if (flags & 1) ++epochs.device;
  if (flags & 2) ++epochs.threadgroup;
}

void Worker::run_group(uint32_t group) {
  start(group);
  for (;;) {
    unsigned moving[kLanes], count = (count_ + kLanes - 1) / kLanes;
    for (unsigned i = 0; i < count; ++i) moving[i] = i;
    while (count) {
      const unsigned chosen = pick(count);
      if (advance(moving[chosen])) continue;
      if (launch.ran_away) return;
      for (unsigned i = chosen + 1; i < count; ++i) moving[i - 1] = moving[i];
      --count;
    }
    bool barrier = false;
    for (unsigned i = 0; i < count_; ++i) barrier |= fibres_[i].state == State::kBarrier;
    if (!barrier || launch.ran_away) return;
    release_barrier();
  }
}

}  // namespace mh

using namespace mh;

extern "C" {

void mh_threadgroup_barrier(unsigned flags, const char* file, int line) {
  Worker& worker = *t_worker;
  const void* pc = __builtin_return_address(0);
  worker.current->site = worker.site(file, line, nullptr, pc);
  worker.current->flags = flags;
  worker.wait(State::kBarrier, pc);
}

void mh_simdgroup_barrier(unsigned flags, const char* file, int line) {
  Worker& worker = *t_worker;
  const void* pc = __builtin_return_address(0);
  worker.current->site = worker.site(file, line, nullptr, pc);
  worker.current->flags = flags;
  worker.wait(State::kSimdBarrier, pc);
}

unsigned mh_collective(const void* in, void* out, unsigned bytes_in, unsigned bytes_out,
                       Combine combine, const char* file, int line) {
  Worker& worker = *t_worker;
  Fibre& fibre = *worker.current;
  const void* pc = __builtin_return_address(0);
  fibre.site = worker.site(file, line, combine, pc);
  fibre.out = out;
  fibre.bytes_in = bytes_in;
  fibre.bytes_out = bytes_out;
  if (bytes_in) std::memcpy(fibre.in, in, bytes_in);
  worker.wait(State::kCollective, pc);
  return fibre.active;
}

void* mh_threadgroup_memory(unsigned id) { return t_worker->threadgroup_memory[id]; }

unsigned mh_lane() { return t_worker->current->thread.index_in_simdgroup; }
}
