// One launch: buffers in, every threadgroup in the order of the schedule, buffers out.
#include <algorithm>
#include <atomic>
#include <csignal>
#include <numeric>
#include <thread>

#include "runtime.h"

namespace mh {
namespace {

void on_fault(int signal_number, siginfo_t* info, void* context) {
  Worker* worker = this_worker();
  if (!worker) {  // not ours: let it happen again with the default action
    signal(signal_number, SIG_DFL);
    return;
  }
  worker->launch.faulted = static_cast<uint32_t>(signal_number);
  worker->launch.fault_address = reinterpret_cast<uint64_t>(info->si_addr);
  worker->launch.fault_pc =
      static_cast<uint64_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  worker->launch.stack_overflow = worker->owns_stack(info->si_addr);
  siglongjmp(worker->escape, 1);
}

// Denormals flush to zero and come in as zero, as on the GPU.
struct FlushDenormals {
  unsigned saved = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
};

// What the operating-system threads of a launch share.
struct Progress {
  uint32_t groups = 1;
  std::atomic<uint32_t> next{0};
  std::atomic<uint64_t> barriers{0}, collectives{0};
};

// The i-th threadgroup to run.
uint32_t group_at(const Launch& launch, uint32_t i, uint32_t groups) {
  switch (static_cast<Schedule>(launch.schedule)) {
    case Schedule::kForward: return i;
    case Schedule::kReverse: return groups - 1 - i;
    case Schedule::kRandom: break;
  }
  // A stride without a common divisor visits every group once.
  uint64_t stride = launch.seed * 7919 + groups / 2 + 1;
  while (std::gcd<uint64_t, uint64_t>(stride, groups) != 1) ++stride;
  return static_cast<uint32_t>(i * stride % groups);
}

void run_worker(Launch& launch, void* const* addresses, Progress& progress) {
  const FlushDenormals flush;
  std::vector<unsigned char> handler_stack(64 * 1024);
  stack_t mine = {}, previous = {};
  mine.ss_sp = handler_stack.data();
  mine.ss_size = handler_stack.size();
  sigaltstack(&mine, &previous);
  {
    Worker worker(launch, addresses);
    if (sigsetjmp(worker.escape, 1) == 0) {
      for (uint32_t i; (i = progress.next++) < progress.groups;) {
        if (launch.ran_away || launch.faulted) break;
        worker.run_group(group_at(launch, i, progress.groups));
      }
    }
    progress.barriers += worker.barriers;
    progress.collectives += worker.collectives;
  }
  sigaltstack(&previous, nullptr);
}

}  // namespace
}  // namespace mh

using namespace mh;

extern "C" void mh_run(Launch* launch) {
  Progress progress;
  for (int i = 0; i < 3; ++i) {
    progress.groups *= (launch->grid[i] + launch->threadgroup[i] - 1) / launch->threadgroup[i];
  }
  launch->threadgroups = progress.groups;
  std::vector<void*> addresses(launch->buffer_count + 1);
  memory_open(*launch, addresses.data());
  if (launch->check) checks_open(*launch, addresses.data());

  struct sigaction action = {}, previous[2];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous[0]);
  sigaction(SIGFPE, &action, &previous[1]);  // what x86 makes of an integer division by zero
  auto work = [&] { run_worker(*launch, addresses.data(), progress); };
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < launch->workers && i < progress.groups; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();

  sigaction(SIGSEGV, &previous[0], nullptr);
  sigaction(SIGFPE, &previous[1], nullptr);
  launch->barriers = progress.barriers;
  launch->collectives = progress.collectives;
  if (launch->check) checks_close(*launch);
  memory_close(*launch);
}

