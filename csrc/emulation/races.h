// Finds races of emulated kernels: two accesses to one byte, one of them a write, that no barrier and no fence orders,
// whatever order the fibres happened to run in. The compiler (-fsanitize=thread -DRSF_RACES) announces every access, and
// races.cpp stands for the library that would otherwise be linked for that. Nothing is left of it in other builds.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulation::races {

enum Kind : int { kRead, kWrite, kAtomic };
enum Order : int { kNone, kAcquire };  // of an atomic access

#ifdef RSF_RACES

#define RSF_UNWATCHED __attribute__((no_sanitize("thread")))

constexpr size_t kRedZone = 256;  // bytes on either side of shared memory that nobody may touch

void forget();                                       // before a launch
void begin(unsigned fibres, unsigned threads);       // the next fibres of the launch, so many to a block
void shared(unsigned block, const void* start, size_t bytes);
void enter(unsigned fibre, const void* stack, size_t bytes);
void leave();
void end();                                          // of the fibre
void mute(int by);                                   // what the emulation does for a fibre is none of its own accesses
void arrive(const void* meeting, bool last);
void depart(const void* meeting);
void fence();
void touch(const void* at, size_t bytes, Kind kind, Order order = kNone);
void copy(const void* from, const void* to, size_t bytes, bool begins);  // in the background; from: null for zeros
unsigned found();                                    // since the launch

#else

#define RSF_UNWATCHED
constexpr size_t kRedZone = 0;
inline void forget() {}
inline void begin(unsigned, unsigned) {}
inline void shared(unsigned, const void*, size_t) {}
inline void enter(unsigned, const void*, size_t) {}
inline void leave() {}
inline void end() {}
inline void mute(int) {}
inline void arrive(const void*, bool) {}
inline void depart(const void*) {}
inline void fence() {}
inline void touch(const void*, size_t, Kind, Order = kNone) {}
inline void copy(const void*, const void*, size_t, bool) {}
inline unsigned found() { return 0; }

#endif

struct Mute {
  Mute() { mute(1); }
  ~Mute() { mute(-1); }
};

}  // namespace emulation::races
