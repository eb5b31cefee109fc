// Runs CUDA kernels on the CPU, slowly: every CUDA thread is a fibre of its own, so that barriers, shuffles, tensor core
// fragments, asynchronous copies and clusters do what the kernels ask of them. For tests on machines without a GPU: the
// same sources, compiled by a C++ compiler with `-include` of this file.
//
// Harsher than a GPU where that finds mistakes: fibres run in shuffled order, shared memory starts as NaN, what an
// asynchronous copy brings is NaN until it is waited for, tensor cores truncate, fewer blocks are resident than the
// device promises, and a launch in which nobody can go on is an error.
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

#include "../common/errors.h"
#include "races.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kAtOnce = 20;         // blocks that are resident at most
constexpr unsigned kMostInCluster = 8;  // that every GPU with clusters allows

struct Meeting {  // a barrier of a known number of fibres
  unsigned expected = 0, arrived = 0, turn = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) unsigned char exchange[2][32][64];
};

struct Cluster;

struct Block {
  unsigned index = 0, rank = 0;
  Cluster* cluster = nullptr;
  Meeting meeting;
  std::unique_ptr<Warp[]> warps;
  Warp* warp = nullptr;  // the first
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  size_t bytes = 0;
};

struct Cluster {
  Meeting meeting;
  Block* blocks[kMostInCluster] = {};
  unsigned size = 0;
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
  unsigned blocks = 0, threads = 0;
  std::function<void()> body;
  uint64_t progress = 0;
};

__attribute__((visibility("hidden"))) inline State the_state;  // one for a library, not one for all
RSF_UNWATCHED inline State& state() { return the_state; }

#if defined(__x86_64__)
// Saves what the calling convention says a function keeps, and goes on where the other one stopped.
__attribute__((naked, noinline, no_sanitize("thread"))) inline void swap_stacks(void** /*from*/, void* /*to*/) {
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
  races::end();
  races::leave();
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

// `orders`: whether what was done before is known to all after; a shuffle, for one, promises no such thing.
inline void meet(Meeting& m, bool orders = true) {
  const races::Mute mute;
  const unsigned turn = m.turn;
  const bool last = ++m.arrived == m.expected;
  if (orders) races::arrive(&m, last);
  if (last) {
    m.arrived = 0;
    ++m.turn;
    ++state().progress;
  }
  while (m.turn == turn) yield();
  if (orders) races::depart(&m);
}

RSF_UNWATCHED inline Fibre& me() { return *state().now; }
RSF_UNWATCHED inline Warp& my_warp() { return me().block->warp[me().thread / 32]; }

// Every lane shows `mine` and then sees what all lanes showed.
template <class T>
inline const unsigned char (&show(const T& mine))[32][64] {
  static_assert(sizeof(T) <= 64);
  Fibre& f = me();
  Warp& w = my_warp();
  const races::Mute mute;
  auto& board = w.exchange[f.phase++ & 1];
  std::memcpy(board[f.thread % 32], &mine, sizeof(T));
  meet(w.meeting, false);
  return board;
}
template <class T>
inline T shown(const unsigned char (&board)[32][64], unsigned lane) {
  const races::Mute mute;
  T value;
  std::memcpy(&value, board[lane & 31], sizeof(T));
  return value;
}

inline int failed(int code, const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  return code;
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
  races::begin(many, threads);
  for (size_t b = 0; b < blocks.size(); ++b) races::shared(b, blocks[b]->shared, blocks[b]->bytes);
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
      races::enter(i, f.stack.get(), kStack);
      enter(f);
      races::leave();
      alive += !f.done;
    }
    idle = s.progress == before ? idle + 1 : 0;
    if (idle > 8) return failed(RSF_STUCK, "nobody can go on: a barrier waits for threads that never come");
  }
  return races::found() ? failed(RSF_RACE, "accesses that nothing orders") : 0;
}

// Runs `body` as a kernel; blocks of a cluster at once, all blocks at once if `together`.
inline int launch(unsigned count, unsigned threads, size_t shared, unsigned cluster, bool together,
                  std::function<void()> body) {
  State& s = state();
  if (threads % 32 || count % cluster || cluster > kMostInCluster)
    return failed(RSF_STUCK, "blocks must be whole warps, and grids whole clusters of 8 blocks at most");
  if (together && count > kAtOnce) return 720;  // cudaErrorCooperativeLaunchTooLarge
  s.blocks = count;
  s.threads = threads;
  s.body = std::move(body);
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Block*> batch;
  races::forget();
  for (unsigned b = 0; b < count; ++b) {
    if (b % cluster == 0) clusters.emplace_back(new Cluster);
    blocks.emplace_back(new Block);
    Block& one = *blocks.back();
    one.index = b;
    one.rank = b % cluster;
    one.cluster = clusters.back().get();
    one.cluster->blocks[one.cluster->size++] = &one;
    one.cluster->meeting.expected = cluster * threads;
    one.meeting.expected = threads;
    one.warps.reset(new Warp[threads / 32]);
    one.warp = one.warps.get();
    for (unsigned w = 0; w < threads / 32; ++w) one.warp[w].meeting.expected = 32;
    one.bytes = shared;
    one.storage.reset(new unsigned char[shared + 2 * races::kRedZone]);
    one.shared = one.storage.get() + races::kRedZone;
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

struct Index {  // every launch has one dimension
  unsigned x;
};
RSF_UNWATCHED inline Index thread_index() { return {me().thread}; }
RSF_UNWATCHED inline Index block_index() { return {me().block->index}; }
RSF_UNWATCHED inline Index block_size() { return {state().threads}; }
RSF_UNWATCHED inline Index grid_size() { return {state().blocks}; }
RSF_UNWATCHED inline unsigned char* shared_memory() { return me().block->shared; }

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

inline void __syncthreads() { emulation::meet(emulation::me().block->meeting); }
inline void __syncwarp(unsigned = ~0u) { emulation::meet(emulation::my_warp().meeting); }
inline void __threadfence() { emulation::races::fence(); }
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
  emulation::races::touch(at, sizeof(T), emulation::races::kAtomic);
  const emulation::races::Mute mute;
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
