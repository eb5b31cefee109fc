// See races.h. Each fibre has a clock, and knows the time of every other fibre of which it has learnt by a barrier or a
// fence (vector clocks); each byte remembers who touched it last, and when. An access is ordered after one before it if
// its fibre knows of a time of the other one that is late enough.
#ifdef RSF_RACES

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

using namespace emulation::races;

// neither announced nor taken into what is
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))

struct Epoch {
  uint32_t fibre, time;  // counted over a launch, from 0; time 0: never
  const void* code;
};

struct Epochs {  // at most one of each fibre
  Epoch* at = nullptr;
  unsigned count = 0, room = 0;
};

struct Byte {
  Epoch write, copy;  // `copy`: one that nobody has waited for yet
  Epochs reads, atomics;
};

constexpr unsigned kPage = 256, kBuckets = 1 << 16, kTold = 3;

struct Page {
  uintptr_t number;
  Page* next;
  Byte bytes[kPage];
};

struct Clocks {  // of a barrier or of the word of an atomic: a clock for every fibre
  const void* key;
  uint32_t *coming, *gone;
  Clocks* next;
};

struct Fibres {
  unsigned first = 0, many = 0, threads = 1;
  uint32_t *clocks = nullptr, *fenced = nullptr, *pending = nullptr;  // (many, many)
  int* muted = nullptr;
  Clocks* meetings[kBuckets] = {};
};

struct Shared {
  const unsigned char* start;
  size_t bytes;
  unsigned ended;  // threads
};

Fibres all;
Page* pages[kBuckets];
Shared* blocks;
unsigned block_count, reported;
int now = -1;
const unsigned char *stack_start, *stack_end;

UNWATCHED unsigned bucket(uintptr_t number) { return (number * 0x9e3779b97f4a7c15ull >> 40) % kBuckets; }

UNWATCHED void* zeros(size_t many, size_t each) {
  void* got = std::calloc(many ? many : 1, each);
  if (!got) std::abort();
  return got;
}

UNWATCHED uint32_t* clock_of(uint32_t* clocks, unsigned fibre) { return clocks + size_t(fibre) * all.many; }

UNWATCHED void join(uint32_t* into, const uint32_t* from) {
  for (unsigned i = 0; i < all.many; ++i)
    if (from[i] > into[i]) into[i] = from[i];
}

UNWATCHED Clocks& clocks_of(const void* key) {
  Clocks*& head = all.meetings[bucket(reinterpret_cast<uintptr_t>(key))];
  for (Clocks* c = head; c; c = c->next)
    if (c->key == key) return *c;
  auto* c = static_cast<Clocks*>(zeros(1, sizeof(Clocks)));
  *c = {key, static_cast<uint32_t*>(zeros(all.many, 4)), static_cast<uint32_t*>(zeros(all.many, 4)), head};
  return *(head = c);
}

UNWATCHED void release_fibres() {
  std::free(all.clocks);
  std::free(all.fenced);
  std::free(all.pending);
  std::free(all.muted);
  for (Clocks*& head : all.meetings)
    while (Clocks* c = head) {
      head = c->next;
      std::free(c->coming);
      std::free(c->gone);
      std::free(c);
    }
}

UNWATCHED Byte& byte_at(uintptr_t address) {
  const uintptr_t number = address / kPage;
  Page*& head = pages[bucket(number)];
  for (Page* p = head; p; p = p->next)
    if (p->number == number) return p->bytes[address % kPage];
  auto* p = static_cast<Page*>(zeros(1, sizeof(Page)));
  p->number = number;
  p->next = head;
  head = p;
  return p->bytes[address % kPage];
}

UNWATCHED bool ordered(const Epoch& e) {
  if (!e.time || e.fibre == all.first + now) return true;
  return e.fibre >= all.first && clock_of(all.clocks, now)[e.fibre - all.first] >= e.time;
}

UNWATCHED void place(char* text, size_t room, uintptr_t at) {
  for (unsigned b = 0; b < block_count; ++b) {
    const auto start = reinterpret_cast<uintptr_t>(blocks[b].start);
    if (at + kRedZone >= start && at < start + blocks[b].bytes + kRedZone) {
      std::snprintf(text, room, "byte %td of the %zu of shared memory of block %u", ptrdiff_t(at - start), blocks[b].bytes,
                    all.first / all.threads + b);
      return;
    }
  }
  std::snprintf(text, room, "global memory at %#zx", size_t(at));
}

UNWATCHED void who(char* text, size_t room, uint32_t fibre, const void* code) {
  Dl_info info{};
  const bool known = code && dladdr(code, &info) && info.dli_fbase;
  const auto offset = known ? static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) : 0;
  std::snprintf(text, room, "thread %u of block %u (code +%#tx)", fibre % all.threads, fibre / all.threads, offset);
}

UNWATCHED void report(uintptr_t at, const char* mine, const void* code, const char* other, const Epoch* e) {
  if (reported++ >= kTold) return;
  char where[128], first[96], second[96] = "";
  place(where, sizeof where, at);
  who(first, sizeof first, all.first + now, code);
  if (e) who(second, sizeof second, e->fibre, e->code);
  std::fprintf(stderr, "emulated kernel: %s: %s %s %s %s\n", where, first, mine, other, second);
}

UNWATCHED void check(const Epochs& others, uintptr_t at, const char* mine, const void* code, const char* what) {
  for (unsigned i = 0; i < others.count; ++i)
    if (!ordered(others.at[i])) return report(at, mine, code, what, &others.at[i]);
}

UNWATCHED void remember(Epochs& epochs, const Epoch& mine) {
  unsigned kept = 0;  // what is ordered before this one says no more than this one, nor two of blocks that have ended
  bool ended = false;
  for (unsigned i = 0; i < epochs.count; ++i) {
    const bool old = epochs.at[i].fibre < all.first;
    if (!ordered(epochs.at[i]) && !(old && ended)) epochs.at[kept++] = epochs.at[i];
    ended |= old;
  }
  epochs.count = kept;
  if (kept == epochs.room) {
    epochs.room = epochs.room ? 2 * epochs.room : 2;
    epochs.at = static_cast<Epoch*>(std::realloc(epochs.at, epochs.room * sizeof(Epoch)));
    if (!epochs.at) std::abort();
  }
  epochs.at[epochs.count++] = mine;
}

// Whether the memory of another block is there: it has begun, as far as this fibre knows, and not ended.
UNWATCHED void check_block(uintptr_t at, const char* mine, const void* code) {
  const unsigned own = now / all.threads;
  for (unsigned b = 0; b < block_count; ++b) {
    const auto start = reinterpret_cast<uintptr_t>(blocks[b].start);
    if (at + kRedZone < start || at >= start + blocks[b].bytes + kRedZone) continue;
    if (at < start || at >= start + blocks[b].bytes) return report(at, mine, code, "outside of it", nullptr);
    if (b == own) return;
    if (blocks[b].ended == all.threads) return report(at, mine, code, "after the block has ended", nullptr);
    for (unsigned t = 0; t < all.threads; ++t)
      if (clock_of(all.clocks, now)[b * all.threads + t]) return;
    return report(at, mine, code, "before the block is known to have begun", nullptr);
  }
}

UNWATCHED void access(const void* where, size_t bytes, Kind kind, const void* code) {
  static const char* const names[] = {"reads", "writes", "adds"};
  const auto first = reinterpret_cast<uintptr_t>(where);
  check_block(first, names[kind], code);
  const Epoch mine{all.first + now, clock_of(all.clocks, now)[now], code};
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Byte& byte = byte_at(at);
    const unsigned before = reported;
    if (byte.copy.time) report(at, names[kind], code, "before it is waited for, a copy by", &byte.copy);
    if (!ordered(byte.write)) report(at, names[kind], code, "unordered with a write by", &byte.write);
    if (kind != kAtomic) check(byte.atomics, at, names[kind], code, "unordered with an addition by");
    if (kind != kRead) check(byte.reads, at, names[kind], code, "unordered with a read by");
    if (kind == kWrite) {
      byte.write = mine;
      byte.reads.count = byte.atomics.count = 0;
    } else {
      remember(kind == kRead ? byte.reads : byte.atomics, mine);
    }
    if (reported != before) return;  // once an access is enough
  }
}

UNWATCHED void seen(const void* where, size_t bytes, Kind kind, const void* code) {
  if (now < 0 || all.muted[now] || (where >= stack_start && where < stack_end)) return;
  ++all.muted[now];
  access(where, bytes, kind, code);
  --all.muted[now];
}

}  // namespace

namespace emulation::races {

UNWATCHED void forget() {
  reported = 0;
  for (Page*& head : pages)
    while (Page* p = head) {
      head = p->next;
      for (Byte& byte : p->bytes) {
        std::free(byte.reads.at);
        std::free(byte.atomics.at);
      }
      std::free(p);
    }
  all.first = all.many = 0;
}

UNWATCHED void begin(unsigned fibres, unsigned threads) {
  release_fibres();
  all.first += all.many;
  all.many = fibres;
  all.threads = threads;
  for (uint32_t** clocks : {&all.clocks, &all.fenced, &all.pending})
    *clocks = static_cast<uint32_t*>(zeros(size_t(fibres) * fibres, 4));
  for (unsigned i = 0; i < fibres; ++i) clock_of(all.clocks, i)[i] = 1;
  all.muted = static_cast<int*>(zeros(fibres, sizeof(int)));
  std::free(blocks);
  block_count = fibres / threads;
  blocks = static_cast<Shared*>(zeros(block_count, sizeof(Shared)));
}

UNWATCHED void shared(unsigned block, const void* start, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {  // what lay there before was another block's
    Byte& byte = byte_at(reinterpret_cast<uintptr_t>(start) + i);
    byte.write.time = byte.copy.time = 0;
    byte.reads.count = byte.atomics.count = 0;
  }
  blocks[block] = {static_cast<const unsigned char*>(start), bytes, 0};
}

UNWATCHED void enter(unsigned fibre, const void* stack, size_t bytes) {
  now = int(fibre);
  stack_start = static_cast<const unsigned char*>(stack);
  stack_end = stack_start + bytes;
}

UNWATCHED void leave() { now = -1; }

// With the last thread its block's memory is gone: what others did there has to be known to one of its threads.
UNWATCHED void end() {
  const unsigned block = now / all.threads;
  Shared& own = blocks[block];
  if (++own.ended < all.threads) return;
  auto* known = static_cast<uint32_t*>(zeros(all.many, 4));
  for (unsigned t = 0; t < all.threads; ++t) join(known, clock_of(all.clocks, block * all.threads + t));
  join(clock_of(all.clocks, now), known);  // this fibre does nothing any more
  std::free(known);
  for (size_t i = 0; i < own.bytes; ++i) {
    const auto at = reinterpret_cast<uintptr_t>(own.start) + i;
    const Byte& byte = byte_at(at);
    const unsigned before = reported;
    if (!ordered(byte.write)) report(at, "ends", nullptr, "while it is written by", &byte.write);
    check(byte.reads, at, "ends", nullptr, "while it is read by");
    check(byte.atomics, at, "ends", nullptr, "while it is added to by");
    if (reported != before) return;
  }
}

UNWATCHED void mute(int by) {
  if (now >= 0) all.muted[now] += by;
}

UNWATCHED void arrive(const void* meeting, bool last) {
  Clocks& clocks = clocks_of(meeting);
  join(clocks.coming, clock_of(all.clocks, now));
  if (!last) return;
  std::memcpy(clocks.gone, clocks.coming, all.many * 4);
  std::memset(clocks.coming, 0, all.many * 4);
}

UNWATCHED void depart(const void* meeting) {
  uint32_t* mine = clock_of(all.clocks, now);
  join(mine, clocks_of(meeting).gone);
  ++mine[now];
}

UNWATCHED void fence() {
  uint32_t* mine = clock_of(all.clocks, now);
  join(mine, clock_of(all.pending, now));
  std::memcpy(clock_of(all.fenced, now), mine, all.many * 4);
  ++mine[now];
}

UNWATCHED void touch(const void* at, size_t bytes, Kind kind, Order order) {
  if (now < 0) return;
  ++all.muted[now];
  access(at, bytes, kind, __builtin_return_address(0));
  if (kind == kAtomic) {
    uint32_t* word = clocks_of(at).gone;
    join(clock_of(order == kAcquire ? all.clocks : all.pending, now), word);
    if (order == kNone) join(word, clock_of(all.fenced, now));
  }
  --all.muted[now];
}

UNWATCHED void copy(const void* from, const void* to, size_t bytes, bool begins) {
  if (now < 0) return;
  const void* code = __builtin_return_address(0);
  const Epoch none{}, mine{all.first + now, clock_of(all.clocks, now)[now], code};
  ++all.muted[now];
  for (size_t i = 0; i < bytes && !begins; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i).copy = none;
  access(to, bytes, kWrite, code);
  if (from) access(from, bytes, kRead, code);
  for (size_t i = 0; i < bytes && begins; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i).copy = mine;
  --all.muted[now];
}

UNWATCHED unsigned found() { return reported; }

}  // namespace emulation::races

// What a compiler calls for every access of the program.
#define RSF_ACCESS(name, bytes, kind) \
  extern "C" UNWATCHED void __tsan_##name(void* at) { seen(at, bytes, kind, __builtin_return_address(0)); }
#define RSF_SIZES(prefix, kind)     \
  RSF_ACCESS(prefix##1, 1, kind)    \
  RSF_ACCESS(prefix##2, 2, kind)    \
  RSF_ACCESS(prefix##4, 4, kind)    \
  RSF_ACCESS(prefix##8, 8, kind)    \
  RSF_ACCESS(prefix##16, 16, kind)
RSF_SIZES(read, kRead)
RSF_SIZES(write, kWrite)
RSF_SIZES(unaligned_read, kRead)
RSF_SIZES(unaligned_write, kWrite)
RSF_SIZES(volatile_read, kRead)
RSF_SIZES(volatile_write, kWrite)

extern "C" {
UNWATCHED void __tsan_read_range(void* at, size_t bytes) { seen(at, bytes, kRead, __builtin_return_address(0)); }
UNWATCHED void __tsan_write_range(void* at, size_t bytes) { seen(at, bytes, kWrite, __builtin_return_address(0)); }
UNWATCHED void __tsan_init() {}
UNWATCHED void __tsan_func_entry(void*) {}
UNWATCHED void __tsan_func_exit() {}
UNWATCHED void __tsan_vptr_read(void**) {}
UNWATCHED void __tsan_vptr_update(void**, void*) {}
UNWATCHED uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return *at; }  // of what is initialised once
}

#endif
