// Subsidy ascent on a GPU, all rounds without the host: rsfast/kmeans/constraint/ascent.py says what is computed.
//
// A round: every point chooses (choose); every cluster of a wrong size becomes a search for the n-th smallest of the
// amounts that would move a point (plan); the searches find five digits of 12 bits, the highest first, each by a
// histogram of those amounts that begin with the digits found (count, pick); the last one found changes a subsidy.
// Counts are integers, so that the order in which threads add them makes no difference.

#include "constraint.h"

#include "../common/device.cuh"
#include "../common/launch.h"

namespace rsf::subsidies {
namespace {

constexpr unsigned kThreads = 256, kEach = 16, kTile = kThreads * kEach;  // points of a thread, of a block
constexpr int kDigit = 12, kDigits = 5;
constexpr unsigned kBins = 1 << kDigit;
constexpr int64_t kFar = int64_t(1) << 62, kWidest = (int64_t(1) << kDigit * kDigits) - 1;
constexpr int64_t kMostClusters = 4096;  // subsidies and counts of all are in a block's shared memory

struct Search {
  int64_t found, rank;  // digits so far; how many-th of the amounts that begin with them
  int32_t cluster, too_large;
};

struct State {
  int32_t searches, changed, settled;
};

struct Work {
  State* state;
  int64_t *best, *margin;  // (points) of the choice: gap less subsidy, and how much more the second one has
  uint32_t* sizes;         // (clusters), 0 between rounds
  uint32_t* bins;          // (clusters, kBins) of the searches, 0 between digits
  Search* searches;        // (clusters)
};

// One array after another in the workspace, each on 16 bytes.
struct Layout {
  unsigned char* at;
  template <class T>
  T* take(int64_t many) {
    T* here = reinterpret_cast<T*>(at);
    at += (many * int64_t(sizeof(T)) + 15) / 16 * 16;
    return here;
  }
};

Work lay_out(void* start, int64_t clusters, int64_t points, int64_t* bytes) {
  Layout layout{static_cast<unsigned char*>(start)};
  Work work;
  work.state = layout.take<State>(1);
  work.sizes = layout.take<uint32_t>(clusters);
  work.bins = layout.take<uint32_t>(clusters * kBins);
  work.searches = layout.take<Search>(clusters);
  work.best = layout.take<int64_t>(points);
  work.margin = layout.take<int64_t>(points);
  *bytes = layout.at - static_cast<unsigned char*>(start);
  return work;
}

// Counts in a table in shared memory, equal neighbours at once: amounts of a kind come in runs.
struct Tally {
  uint32_t* table;
  unsigned bin = 0, many = 0;
  __device__ void add(unsigned to) {
    if (to != bin) flush();
    bin = to;
    ++many;
  }
  __device__ void flush() {
    if (many) atomicAdd(&table[bin], many);
    many = 0;
  }
};

__global__ void clear(Work work, unsigned clusters) {
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x, first = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (uint64_t i = first; i < uint64_t(clusters) * kBins; i += step) work.bins[i] = 0;
  for (uint64_t i = first; i < clusters; i += step) work.sizes[i] = 0;
  if (first == 0) *work.state = State{0, 1, 0};
}

__global__ void choose(Work work, unsigned clusters, uint64_t points, const int64_t* gaps, const int64_t* subsidies,
                       int64_t* labels) {
  if (work.state->settled) return;
  RSF_SHARED(shared);
  auto* paid = reinterpret_cast<int64_t*>(shared);
  auto* sizes = reinterpret_cast<uint32_t*>(paid + clusters);
  for (unsigned k = threadIdx.x; k < clusters; k += kThreads) {
    paid[k] = subsidies[k];
    sizes[k] = 0;
  }
  __syncthreads();
  Tally tally{sizes};
  for (unsigned j = 0; j < kEach; ++j) {
    const uint64_t i = uint64_t(blockIdx.x) * kTile + j * kThreads + threadIdx.x;
    if (i >= points) break;
    int64_t best = kFar, second = kFar;
    unsigned label = 0;
#pragma unroll 4
    for (unsigned k = 0; k < clusters; ++k) {
      const int64_t score = gaps[k * points + i] - paid[k];
      if (score < best) {
        second = best;
        best = score;
        label = k;
      } else if (score < second) {
        second = score;
      }
    }
    labels[i] = label;
    work.best[i] = best;
    work.margin[i] = second - best;
    tally.add(label);
  }
  tally.flush();
  __syncthreads();
  for (unsigned k = threadIdx.x; k < clusters; k += kThreads)
    if (sizes[k]) atomicAdd(&work.sizes[k], sizes[k]);
}

// One warp: which clusters have a wrong size, and how many points have to come or go.
__global__ void plan(Work work, unsigned clusters, const int64_t* lower, const int64_t* upper,
                     const int64_t* subsidies) {
  State& state = *work.state;
  if (state.settled) return;
  unsigned searches = 0;
  for (unsigned first = 0; first < clusters; first += 32) {
    const unsigned k = first + threadIdx.x;
    int64_t size = 0, least = 0, most = 0;
    if (k < clusters) {
      size = work.sizes[k];
      least = subsidies[k] < 0 ? upper[k] : lower[k];
      most = subsidies[k] > 0 ? lower[k] : upper[k];
      work.sizes[k] = 0;
    }
    const bool wrong = size < least || size > most;
    const unsigned all = __ballot_sync(~0u, wrong), before = all & ((1u << threadIdx.x) - 1);
    if (wrong)
      work.searches[searches + __popc(before)] = {0, size < least ? least : size - most, int32_t(k), size > most};
    searches += __popc(all);
  }
  __syncwarp();
  if (threadIdx.x == 0) {
    state.settled = !searches || !state.changed;
    state.searches = state.settled ? 0 : searches;
    state.changed = 0;
  }
}

// A block counts one digit of the amounts of one search and one tile of points.
__global__ void count(Work work, uint64_t points, unsigned tiles, int digit, const int64_t* gaps,
                      const int64_t* subsidies, const int64_t* labels) {
  const unsigned which = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  if (int(which) >= work.state->searches) return;
  RSF_SHARED(shared);
  auto* bins = reinterpret_cast<uint32_t*>(shared);
  for (unsigned b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const Search search = work.searches[which];
  const int64_t *column = gaps + search.cluster * points, paid = subsidies[search.cluster];
  const int shift = kDigit * (kDigits - 1 - digit);
  Tally tally{bins};
  for (unsigned j = 0; j < kEach; ++j) {
    const uint64_t i = uint64_t(tile) * kTile + j * kThreads + threadIdx.x;
    if (i >= points) break;
    if (search.too_large && labels[i] != search.cluster) continue;
    const int64_t amount = min(search.too_large ? work.margin[i] : column[i] - paid - work.best[i], kWidest);
    if (amount >> shift >> kDigit == search.found) tally.add((amount >> shift) & (kBins - 1));
  }
  tally.flush();
  __syncthreads();
  for (unsigned b = threadIdx.x; b < kBins; b += kThreads)
    if (bins[b]) atomicAdd(&work.bins[which * uint64_t(kBins) + b], bins[b]);
}

// A block finds the digit of one search; with the last one it changes the subsidy.
__global__ void pick(Work work, int digit, int64_t* subsidies) {
  if (int(blockIdx.x) >= work.state->searches) return;
  RSF_SHARED(shared);
  auto* sums = reinterpret_cast<uint32_t*>(shared);
  constexpr unsigned kShare = kBins / kThreads;
  uint32_t* bins = work.bins + blockIdx.x * uint64_t(kBins);
  Search& search = work.searches[blockIdx.x];
  sums[threadIdx.x] = 0;
  for (unsigned b = 0; b < kShare; ++b) sums[threadIdx.x] += bins[threadIdx.x * kShare + b];
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t rank = search.rank;
    unsigned bin = 0;
    while (bin < kBins - kShare && rank > sums[bin / kShare]) {
      rank -= sums[bin / kShare];
      bin += kShare;
    }
    while (bin < kBins - 1 && rank > bins[bin]) rank -= bins[bin++];
    const int64_t found = search.found << kDigit | bin;
    search.found = found;
    search.rank = rank;
    if (digit == kDigits - 1) {
      const int64_t paid = subsidies[search.cluster];
      int64_t now = search.too_large ? paid - found : paid + found;
      if (search.too_large && paid > 0) now = max(now, int64_t(0));
      if (!search.too_large && paid < 0) now = min(now, int64_t(0));
      if (now != paid) {
        subsidies[search.cluster] = now;
        atomicAdd(&work.state->changed, 1);  // of several blocks
      }
    }
  }
  __syncthreads();
  for (unsigned b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
}

// What every place costs point i more than its own.
template <class Visit>
__device__ void visit_moves(unsigned clusters, uint64_t points, uint64_t i, const int64_t* gaps, const int64_t* paid,
                            unsigned label, Visit visit) {
  const int64_t own = gaps[label * points + i] - paid[label];
#pragma unroll 4
  for (unsigned k = 0; k < clusters; ++k)
    if (k != label) visit(gaps[k * points + i] - paid[k] - own);
}

__global__ void widths(unsigned clusters, uint64_t points, const int64_t* gaps, const int64_t* subsidies,
                       const int64_t* labels, unsigned long long* counts) {
  RSF_SHARED(shared);
  auto* table = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x < 64) table[threadIdx.x] = 0;
  __syncthreads();
  Tally tally{table};
  for (unsigned j = 0; j < kEach; ++j) {
    const uint64_t i = uint64_t(blockIdx.x) * kTile + j * kThreads + threadIdx.x;
    if (i >= points) break;
    visit_moves(clusters, points, i, gaps, subsidies, unsigned(labels[i]), [&](int64_t slack) {
      int exponent;
      frexp(double(slack), &exponent);  // rounded as PyTorch rounds it
      tally.add(min(max(exponent, 0), 63));
    });
  }
  tally.flush();
  __syncthreads();
  const unsigned width = threadIdx.x;
  if (width < 64 && table[width]) atomicAdd(&counts[width], static_cast<unsigned long long>(table[width]));
}

__global__ void near(unsigned clusters, uint64_t points, int64_t reach, const int64_t* gaps, const int64_t* subsidies,
                     const int64_t* labels, uint8_t* result) {
  for (unsigned j = 0; j < kEach; ++j) {
    const uint64_t i = uint64_t(blockIdx.x) * kTile + j * kThreads + threadIdx.x;
    if (i >= points) break;
    bool found = false;
    visit_moves(clusters, points, i, gaps, subsidies, unsigned(labels[i]),
                [&](int64_t slack) { found |= slack <= reach; });
    result[i] = found;
  }
}

bool served(int64_t clusters, int64_t points) {
  return clusters >= 1 && clusters <= kMostClusters && points >= 1 && points < int64_t(1) << 31;
}

}  // namespace
}  // namespace rsf::subsidies

using namespace rsf::subsidies;

int64_t rsf_climb_workspace(int64_t clusters, int64_t points) {
  if (!served(clusters, points)) return RSF_OUT_OF_RANGE;
  int64_t bytes;
  lay_out(nullptr, clusters, points, &bytes);
  return bytes;
}

int rsf_climb(int64_t clusters, int64_t points, int64_t rounds, const int64_t* gaps, const int64_t* lower,
              const int64_t* upper, int64_t* subsidies, int64_t* labels, void* workspace, int64_t bytes, void* stream) {
  if (!served(clusters, points) || rounds < 0) return RSF_OUT_OF_RANGE;
  int64_t needed;
  const Work work = lay_out(workspace, clusters, points, &needed);
  if (bytes < needed) return RSF_WORKSPACE_TOO_SMALL;
  const unsigned k = unsigned(clusters), tiles = unsigned((points + kTile - 1) / kTile);
  const rsf::Shape chooses{tiles, kThreads, k * (sizeof(int64_t) + sizeof(uint32_t))};
  int code = rsf::launch(clear, {256, kThreads}, stream, work, k);
  for (int64_t round = 0; round <= rounds && !code; ++round) {
    code = rsf::launch(choose, chooses, stream, work, k, uint64_t(points), gaps, subsidies, labels);
    if (round == rounds || code) break;
    code = rsf::launch(plan, {1, 32}, stream, work, k, lower, upper, subsidies);
    for (int digit = 0; digit < kDigits && !code; ++digit) {
      code = rsf::launch(count, {tiles * k, kThreads, kBins * sizeof(uint32_t)}, stream, work, uint64_t(points), tiles,
                         digit, gaps, subsidies, labels);
      if (!code) code = rsf::launch(pick, {k, kThreads, kThreads * sizeof(uint32_t)}, stream, work, digit, subsidies);
    }
  }
  return code;
}

int rsf_widths(int64_t clusters, int64_t points, const int64_t* gaps, const int64_t* subsidies, const int64_t* labels,
               int64_t* counts, void* stream) {
  if (!served(clusters, points)) return RSF_OUT_OF_RANGE;
  return rsf::launch(widths, {unsigned((points + kTile - 1) / kTile), kThreads, 64 * sizeof(uint32_t)}, stream,
                     unsigned(clusters), uint64_t(points), gaps, subsidies, labels,
                     reinterpret_cast<unsigned long long*>(counts));
}

int rsf_near(int64_t clusters, int64_t points, int64_t reach, const int64_t* gaps, const int64_t* subsidies,
             const int64_t* labels, uint8_t* result, void* stream) {
  if (!served(clusters, points)) return RSF_OUT_OF_RANGE;
  return rsf::launch(near, {unsigned((points + kTile - 1) / kTile), kThreads}, stream, unsigned(clusters),
                     uint64_t(points), reach, gaps, subsidies, labels, result);
}
