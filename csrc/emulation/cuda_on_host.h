// Runs CUDA kernels on the CPU, slowly: every CUDA thread is a fibre of its own, so that barriers, shuffles, tensor core
// fragments, asynchronous copies and clusters do what the kernels ask of them. For tests on machines without a GPU: the
// same sources, compiled by a C++ compiler with `-include` of this file.
//
// Harsher than a GPU where that finds mistakes: fibres run in shuffled order, shared memory starts as NaN, what an
// asynchronous copy brings is NaN until it is waited for, tensor cores truncate, and a launch in which nobody can go on
// is an error.
#pragma once
#define RSF_EMULATION 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Meeting {  // a barrier of a known number of fibres
  unsigned expected = 0, arrived = 0, turn = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) unsigned char exchange[2][32][64];
};

struct Cluster;

struct Block {
  dim3 index;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  Meeting meeting;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
};

struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
};

struct Fibre {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  Block* block = nullptr;
  unsigned thread = 0, phase = 0;
  std::vector<std::vector<Copy>> groups{1};
  bool done = false;
};

struct State {
  std::vector<Fibre> fibres;
  std::vector<unsigned> order;
  size_t at = 0;
  Fibre* now = nullptr;
  void* scheduler = nullptr;
#if !defined(__x86_64__)
  ucontext_t home;
#endif
  dim3 grid, block;
  std::function<void()> body;
  uint64_t progress = 0;
};

inline State& state() {
  static State s;
  return s;
}

#if defined(__x86_64__)
// Saves what the calling convention says a function keeps, and goes on where the other one stopped.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void leave(Fibre& f) { swap_stacks(&f.stack_pointer, state().scheduler); }
inline void enter(Fibre& f) { swap_stacks(&state().scheduler, f.stack_pointer); }
#else
inline void leave(Fibre& f) { swapcontext(&f.context, &state().home); }
inline void enter(Fibre& f) { swapcontext(&state().home, &f.context); }
#endif

inline void run() {  // what a fibre does from its first entry to its end
  State& s = state();
  s.body();
  s.now->done = true;
  ++s.progress;
  leave(*s.now);
  std::abort();
}

inline void prepare(Fibre& f) {
  if (!f.stack) f.stack.reset(new unsigned char[kStack]);
  f.done = false;
  f.phase = 0;
  f.groups.assign(1, {});
#if defined(__x86_64__)
  auto top = (reinterpret_cast<uintptr_t>(f.stack.get()) + kStack) & ~uintptr_t(15);
  auto* frame = reinterpret_cast<void**>(top) - 2;  // a return address, and the alignment a call would leave
  frame[0] = reinterpret_cast<void*>(&run);
  frame[1] = nullptr;
  f.stack_pointer = frame - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, &run, 0);
#endif
}

inline void yield() { leave(*state().now); }

inline void meet(Meeting& m) {
  const unsigned turn = m.turn;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    ++m.turn;
    ++state().progress;
    return;
  }
  while (m.turn == turn) yield();
}

inline Fibre& me() { return *state().now; }
inline Warp& my_warp() { return me().block->warps[me().thread / 32]; }

// Every lane shows `mine` and then sees what all lanes showed.
template <class T>
inline const unsigned char (&show(const T& mine))[32][64] {
  static_assert(sizeof(T) <= 64);
  Fibre& f = me();
  Warp& w = my_warp();
  auto& board = w.exchange[f.phase++ & 1];
  std::memcpy(board[f.thread % 32], &mine, sizeof(T));
  meet(w.meeting);
  return board;
}
template <class T>
inline T shown(const unsigned char (&board)[32][64], unsigned lane) {
  T value;
  std::memcpy(&value, board[lane & 31], sizeof(T));
  return value;
}

inline int failed(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  return -100;
}

inline int go(std::vector<Block*>& blocks, unsigned threads) {
  State& s = state();
  const size_t many = blocks.size() * threads;
  if (s.fibres.size() < many) s.fibres.resize(many);
  s.order.resize(many);
  for (size_t i = 0; i < many; ++i) {
    Fibre& f = s.fibres[i];
    f.block = blocks[i / threads];
    f.thread = i % threads;
    prepare(f);
    s.order[i] = i;
  }
  std::mt19937 shuffle(static_cast<unsigned>(many * 7919 + 17));
  std::shuffle(s.order.begin(), s.order.end(), shuffle);
  size_t alive = many;
  for (unsigned idle = 0; alive;) {
    const uint64_t before = s.progress;
    alive = 0;
    for (unsigned i : s.order) {
      Fibre& f = s.fibres[i];
      if (f.done) continue;
      s.now = &f;
      enter(f);
      alive += !f.done;
    }
    idle = s.progress == before ? idle + 1 : 0;
    if (idle > 8) return failed("nobody can go on: a barrier waits for threads that never come");
  }
  return 0;
}

// Runs `body` as a kernel; blocks of a cluster at once, all blocks at once if `together`.
inline int launch(dim3 grid, dim3 block, size_t shared, unsigned cluster, bool together, std::function<void()> body) {
  State& s = state();
  const unsigned threads = block.x * block.y * block.z, count = grid.x * grid.y * grid.z;
  if (threads % 32 || grid.x % cluster) return failed("blocks must be whole warps and grids whole clusters");
  s.grid = grid;
  s.block = block;
  s.body = std::move(body);
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Block*> batch;
  for (unsigned b = 0; b < count; ++b) {
    if (b % cluster == 0) clusters.emplace_back(new Cluster);
    blocks.emplace_back(new Block);
    Block& one = *blocks.back();
    one.index = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    one.rank = b % cluster;
    one.cluster = clusters.back().get();
    one.cluster->blocks.push_back(&one);
    one.cluster->meeting.expected = cluster * threads;
    one.meeting.expected = threads;
    one.warps.resize(threads / 32);
    for (Warp& w : one.warps) w.meeting.expected = 32;
    one.storage.reset(new unsigned char[shared]);
    one.shared = one.storage.get();
    std::memset(one.shared, 0xff, shared);  // as numbers: NaN
    batch.push_back(&one);
    if (!together && (b + 1) % cluster == 0) {
      if (int code = go(batch, threads)) return code;
      batch.clear();
      blocks.clear();
      clusters.clear();
    }
  }
  return batch.empty() ? 0 : go(batch, threads);
}

inline dim3 thread_index() {
  const dim3 b = state().block;
  const unsigned t = me().thread;
  return dim3(t % b.x, t / b.x % b.y, t / (b.x * b.y));
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::me().block->index)
#define blockDim (emulation::state().block)
#define gridDim (emulation::state().grid)

inline void __syncthreads() { emulation::meet(emulation::me().block->meeting); }
inline void __syncwarp(unsigned = ~0u) { emulation::meet(emulation::my_warp().meeting); }
inline void __threadfence() {}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = emulation::me().thread % 32;
  return emulation::shown<T>(emulation::show(value), lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto& board = emulation::show(predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(emulation::shown<int>(board, lane) != 0) << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T, class U>
inline T atomicAdd(T* at, U by) {
  const T before = *at;
  *at = before + T(by);
  ++emulation::state().progress;
  return before;
}
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, 4);
  return x;
}
using std::max;
using std::min;
