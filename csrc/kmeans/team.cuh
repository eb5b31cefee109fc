// A team of blocks (a cluster) takes tiles of rows together: each block multiplies its columns, each decides its share
// of the rows, and all learn the labels. What does not depend on how the products are made.
#pragma once
#include "problem.cuh"

namespace rsf::kmeans {

template <class T>
struct Kind {  // 16-bit rows are multiplied as they are
  using Part = T;
  static constexpr int kScoreProducts = 2, kParts = 1;
};
template <>
struct Kind<float> {  // in bf16 parts: three hold all bits, two are enough for a score
  using Part = Bf16;
  static constexpr int kScoreProducts = 3, kParts = 3;
};

__device__ __forceinline__ uint16_t rounded(Bf16, float v) { return to_bf16(v).bits; }
__device__ __forceinline__ uint16_t rounded(Fp16, float v) { return to_fp16(v).bits; }
__device__ __forceinline__ float value(Bf16, uint32_t bits) { return to_float(Bf16{uint16_t(bits)}); }
__device__ __forceinline__ float value(Fp16, uint32_t bits) { return to_float(Fp16{uint16_t(bits)}); }
__device__ __forceinline__ uint32_t one(Bf16) { return 0x3f80; }
__device__ __forceinline__ uint32_t one(Fp16) { return 0x3c00; }

// a centre about the mean of fp16 centres may be twice as large as fp16 holds
__device__ __forceinline__ float center_scale(Bf16) { return 1.0f; }
__device__ __forceinline__ float center_scale(Fp16) { return 0.25f; }

// |x.c - what the parts multiply to| <= split_error ||x|| ||c|| + split_floor sqrt(width) ||x||
template <class T>
__device__ __forceinline__ double split_error() {
  return sizeof(T) == 4 ? 0x3p-18 : 0x1p-18;
}
__device__ __forceinline__ double split_floor(Bf16) { return 0x1p-120; }
__device__ __forceinline__ double split_floor(Fp16) { return 0x1p-22; }

template <class Tile>
struct TeamShared {
  float exchange[Tile::kExchangeRows * Tile::kScorePitch];  // scores of this block's rows, from every block
  int64_t before[Tile::kRows];
  uint64_t candidates[Tile::kRows];
  double energy[Tile::kWarps * 4];  // of the lanes that take rows
  int32_t label[Tile::kRows], count[Tile::kClusters], changed[Tile::kWarps * 4];
  int32_t doubts, share;
};

template <class Tile>
struct Shared {
  union {
    typename Tile::Stages stages;
    struct {
      double numbers[2][Tile::kThreads];
      float fresh[Tile::kClusters * kGroup];
    } scratch;  // between passes
  };
  TeamShared<Tile> team;
  double norms[Tile::kClusters], totals[Tile::kClusters], next_totals[Tile::kClusters], means[kGroup];
  Status status;
  int64_t whole_changed;
  float bias[Tile::kClusters];
  int32_t count[Tile::kClusters], chosen[Tile::kClusters];
  float by_norm, always;
};

template <class Tile>
struct Team {
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kRows, kWarps = Tile::kWarps, kThreads = kWarps * 32;
  static constexpr int kClusters = Tile::kClusters;

  const Problem& p;
  const Workspace& w;
  Shared<Tile>& block;
  TeamShared<Tile>& s;
  const int64_t* order;  // of this iteration

  // Registers are scarce: what can be asked for or lies in shared memory is not kept.
  __device__ Team(Shared<Tile>& block, const Problem& p, const Workspace& w)
      : p(p), w(w), block(block), s(block.team), order(p.order) {
    if (thread() == 0) s.share = (kRows + members() - 1) / members();
    cluster_barrier();
  }
  __device__ static int rank() { return cluster_rank(); }
  __device__ static int members() { return cluster_size(); }
  __device__ static int team() { return blockIdx.x / members(); }
  __device__ static int thread() { return threadIdx.x; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return thread() / 32; }
  __device__ static int first_column() { return rank() * Tile::kSlice; }
  __device__ int share() const { return s.share; }  // rows of a tile that a block decides

  __device__ int64_t row_at(int64_t position) const { return order ? order[position] : position; }
  __device__ int tiles() const {  // of this team
    const int all = (p.taken + kRows - 1) / kRows;
    return team() < all ? (all - team() + w.teams - 1) / w.teams : 0;
  }

  __device__ void begin() {
    if (thread() < kWarps * 4) {
      s.energy[thread()] = 0;
      s.changed[thread()] = 0;
    }
    if (thread() == 0) s.doubts = 0;
    for (int k = thread(); k < kClusters; k += kThreads) s.count[k] = 0;
  }

  __device__ void remember_labels(int tile) {
    const int64_t position = int64_t(tile) * kRows + rank() * share() + thread();
    if (p.labels && thread() < share() && rank() * share() + thread() < kRows && position < p.taken)
      s.before[thread()] = p.labels[position];
  }

  // Where a block puts its scores of a tile's row: at the block that decides it.
  __device__ float* scores_of(int row) const {
    return in_block(s.exchange, row / share()) + (rank() * share() + row % share()) * Tile::kScorePitch;
  }
  __device__ float whole(int local, int k) const {
    float sum = 0;
    for (int block = 0; block < members(); ++block) sum += s.exchange[(block * share() + local) * Tile::kScorePitch + k];
    return sum;
  }

  // Labels of the rows that are this block's to decide, for all blocks: -1 in doubt, -2 no row. Eight lanes take a row.
  __device__ void decide(int tile) {
    constexpr int kEach = kClusters / 8;
    const int sub = lane() % 8;
    for (int base = warp() * 4; base < share(); base += kWarps * 4) {
      const int local = base + lane() / 8, row = rank() * share() + local;
      const int64_t position = int64_t(tile) * kRows + row;
      const bool ours = local < share() && row < kRows, there = ours && position < p.taken;
      float scores[kEach], best = __uint_as_float(0x7f800000), second = best;
      int at = sub;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int k = sub + 8 * i;
        scores[i] = block.bias[k] - 2 / center_scale(typename Tile::Part{}) * (there ? whole(local, k) : 0.0f);
        if (scores[i] < best) {
          second = best;
          best = scores[i];
          at = k;
        } else {
          second = scores[i] < second ? scores[i] : second;
        }
      }
#pragma unroll
      for (int by = 4; by; by /= 2) {
        const float other = __shfl_xor_sync(~0u, best, by), next = __shfl_xor_sync(~0u, second, by);
        const int its = __shfl_xor_sync(~0u, at, by);
        const bool better = other < best || (other == best && its < at);
        second = better ? (best < next ? best : next) : (other < second ? other : second);
        best = better ? other : best;
        at = better ? its : at;
      }
      const float squared = there ? whole(local, kClusters) : 0.0f;
      const float slack = 2 * (block.by_norm * sqrtf(squared) + block.always);
      const bool doubt = p.exact && !(second - best > slack);  // also where something is no number
      uint64_t candidates = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        candidates |= uint64_t(__ballot_sync(~0u, !(scores[i] > best + slack)) >> (lane() / 8 * 8) & 0xff) << (8 * i);
      const int label = !there ? -2 : doubt ? -1 : min(at, p.clusters - 1);
      if (sub == 0 && there) {
        s.energy[warp() * 4 + lane() / 8] += squared;
        if (doubt) s.candidates[row] = candidates;
        else if (p.labels) {
          s.changed[warp() * 4 + lane() / 8] += s.before[local] != label;
          p.labels[position] = label;
        }
      }
      if (ours && sub < members()) in_block(s.label, sub)[row] = label;
    }
  }

  // Rows in doubt to the team's list, in the order of the rows; in every block, so that all know how many.
  __device__ void note_doubts(int tile) {
    if (warp() != 0) return;
    int doubts = s.doubts;
    for (int first = 0; first < kRows; first += 32) {
      const int row = first + lane();
      const bool doubt = row < kRows && s.label[row < kRows ? row : 0] == -1;
      const unsigned all = __ballot_sync(~0u, doubt);
      if (doubt && row / share() == rank()) {
        Doubt& noted = w.doubts[team() * w.team_rows + doubts + __popc(all & ((1u << lane()) - 1))];
        noted.position = int64_t(tile) * kRows + row;
        noted.candidates = s.candidates[row];
      }
      doubts += __popc(all);
    }
    __syncwarp();
    if (lane() == 0) s.doubts = doubts;
  }

  __device__ void count() {  // whole numbers, whose order does not matter
    if (rank() != 0) return;
    for (int row = thread(); row < kRows; row += kThreads)
      if (s.label[row] >= 0) atomicAdd(&s.count[s.label[row]], 1);
  }

  // ||x - c||^2 - s as it is written, in float64, among the candidates; every lane has the result.
  __device__ int nearest(int64_t row, uint64_t candidates) const {
    const T* x = static_cast<const T*>(p.x) + row * p.pitch;
    double best = 0;
    int at = -1;
    for (int k = 0; k < p.clusters; ++k) {
      if (!(candidates >> k & 1)) continue;
      const float* center = p.centers + int64_t(k) * p.width;
      double sum = 0;
      for (int d = lane(); d < p.width; d += 32) {
        const double difference = double(to_float(x[d])) - double(center[d]);
        sum += difference * difference;
      }
      for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      if (p.subsidies) sum -= p.subsidies[k];
      if (at < 0 || sum < best) {
        best = sum;
        at = k;
      }
    }
    return max(at, 0);
  }

  // Decides the rows in doubt, and adds each to the sums by `add(load, stage)` as tiles of their own.
  template <class Add>
  __device__ void settle(Add add) {
    __threadfence();
    cluster_barrier();  // lists are whole
    const int many = s.doubts;
    Doubt* list = w.doubts + team() * w.team_rows;
    for (int i = rank() * kWarps + warp(); i < many; i += members() * kWarps) {
      const int64_t position = list[i].position;
      const int label = nearest(row_at(position), list[i].candidates);
      if (lane() == 0) {
        list[i].label = label;
        if (p.labels) {
          s.changed[warp() * 4] += p.labels[position] != label;
          p.labels[position] = label;
        }
      }
      __syncwarp();
    }
    __threadfence();
    cluster_barrier();
    for (int first = 0; first < many; first += kRows) {
      __syncthreads();
      for (int row = thread(); row < kRows; row += kThreads)
        s.label[row] = first + row < many ? int(list[first + row].label) : -2;
      add([&](int row) { return first + row < many ? row_at(list[first + row].position) : -1; });
    }
  }

  // Everything of a pass but the sums.
  __device__ void report() {
    __syncthreads();
    if (rank() == 0)
      for (int k = thread(); k < kClusters; k += kThreads) w.slot_counts[team() * kClusters + k] = s.count[k];
    if (thread() == 0) {
      int64_t all = 0;
      double energy = 0;
      for (int i = 0; i < kWarps * 4; ++i) {
        energy += s.energy[i];
        all += s.changed[i];
      }
      w.energy[blockIdx.x] = energy;
      w.changed[blockIdx.x] = all;
      w.doubtful[blockIdx.x] = rank() == 0 ? s.doubts : 0;
    }
  }
};

}  // namespace rsf::kmeans
