// k-means with one read of the rows an iteration, and all iterations in one launch.
//
//   l_i = argmin_k ||c_k||^2 - s_k - 2 x_i.(c_k - m),  m = mean_k c_k    (the nearest centre; ties: the lowest index)
//   S_k = sum_i [l_i = k] x_i,  n_k = sum_i [l_i = k]
//
// A team (a cluster of blocks) shares the columns and takes every so-many-th tile of rows. Labels equal a float64
// argmin: a row whose two best scores are closer than their error is put aside and decided in float64 after the tiles.
// Sums of a tile are added to sums in registers, those of all teams in the order of the teams: no atomics on floating
// point numbers, the same bits every time on one kind of GPU.
#pragma once
#include "finish.cuh"

namespace rsf::kmeans {

template <class Tile>
struct Pass {
  using Shared = typename Tile::Shared;
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kRows, kWarps = Tile::kWarps, kClusters = Tile::kClusters;

  Shared& s;
  const Problem& p;
  const Workspace& w;
  const int64_t* order;  // of this iteration
  int rank, members, team, lane, warp, first_column, share;

  __device__ Pass(Shared& s, const Problem& p, const Workspace& w) : s(s), p(p), w(w), order(p.order) {
    rank = cluster_rank();
    members = cluster_size();
    team = blockIdx.x / members;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    first_column = rank * Tile::kSlice;
    share = (kRows + members - 1) / members;  // rows of a tile that a block decides
  }

  __device__ int64_t row_at(int64_t position) const { return order ? order[position] : position; }

  __device__ void load(int stage, int64_t tile) {
    Tile::load(s, stage, p, first_column, [&](int r) {
      const int64_t position = tile * kRows + r;
      return position < p.taken ? row_at(position) : -1;
    });
  }

  // This block's scores of a tile, each to the block that decides its row.
  __device__ void exchange() {
    for (int r = warp; r < kRows; r += kWarps) {
      float* out = in_block(s.exchange, r / share) + (rank * share + r % share) * Tile::kScorePitch;
      for (int k = lane; k <= kClusters; k += 32) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += s.partial[i][r * Tile::kScorePitch + k];
        out[k] = sum;
      }
    }
  }

  __device__ float whole(int local, int k) const {
    float sum = 0;
    for (int block = 0; block < members; ++block) sum += s.exchange[(block * share + local) * Tile::kScorePitch + k];
    return sum;
  }

  // Labels of the rows that are this block's to decide, for all blocks of the team: -1 in doubt, -2 no row.
  __device__ void decide(int64_t tile, double& energy, int32_t& changed) {
    constexpr int kEach = (kClusters + 31) / 32;
    for (int local = warp; local < share; local += kWarps) {
      const int r = rank * share + local;
      const int64_t position = tile * kRows + r;
      if (r >= kRows) break;
      int label = -2;
      if (position < p.taken) {
        float scores[kEach], best = __uint_as_float(0x7f800000), second = best;
        int at = lane;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int k = lane + 32 * i;
          scores[i] = k < kClusters ? s.bias[k] - 2 / center_scale(typename Tile::Part{}) * whole(local, k) : second;
          if (scores[i] < best) {
            second = best;
            best = scores[i];
            at = k;
          } else {
            second = scores[i] < second ? scores[i] : second;
          }
        }
        for (int by = 16; by; by /= 2) {
          const float other = __shfl_xor_sync(~0u, best, by), next = __shfl_xor_sync(~0u, second, by);
          const int its = __shfl_xor_sync(~0u, at, by);
          const bool better = other < best || (other == best && its < at);
          second = better ? (best < next ? best : next) : (other < second ? other : second);
          best = better ? other : best;
          at = better ? its : at;
        }
        const float squared = whole(local, kClusters);
        const float slack = 2 * (s.by_norm * sqrtf(squared) + s.always);
        label = min(at, p.clusters - 1);
        if (p.exact && !(second - best > slack)) {  // also where something is no number
          uint64_t candidates = 0;
#pragma unroll
          for (int i = 0; i < kEach; ++i)
            candidates |= uint64_t(__ballot_sync(~0u, !(scores[i] > best + slack))) << (32 * i);
          if (lane == 0) s.candidates[r] = candidates;
          label = -1;
        }
        if (lane == 0) {
          energy += squared;
          if (label >= 0 && p.labels) {
            changed += s.before[local] != label;
            p.labels[position] = label;
          }
        }
      }
      if (lane < members) in_block(s.label, lane)[r] = label;
    }
  }

  // Rows in doubt to the team's list, in the order of the rows; by the first warp of every block, so that all know how many.
  __device__ void note_doubts(int64_t tile, int& doubts) {
    const bool mine = lane < kRows && s.label[lane < kRows ? lane : 0] == -1;
    const unsigned all = __ballot_sync(~0u, mine);
    if (mine && lane / share == rank) {
      Doubt& doubt = w.doubts[team * w.team_rows + doubts + __popc(all & ((1u << lane) - 1))];
      doubt.position = tile * kRows + lane;
      doubt.candidates = s.candidates[lane];
    }
    doubts += __popc(all);
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
      for (int d = lane; d < p.width; d += 32) {
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

  __device__ void settle(int doubts, int32_t& changed) {
    Doubt* list = w.doubts + team * w.team_rows;
    for (int i = rank * kWarps + warp; i < doubts; i += members * kWarps) {
      const int64_t position = list[i].position;
      const int label = nearest(row_at(position), list[i].candidates);
      if (lane == 0) {
        list[i].label = label;
        if (p.labels) {
          changed += p.labels[position] != label;
          p.labels[position] = label;
        }
      }
      __syncwarp();
    }
    __threadfence();
    cluster_barrier();
  }

  __device__ void count() {  // by one warp of the first block; whole numbers, whose order does not matter
    if (rank == 0 && warp == 0 && lane < kRows && s.label[lane] >= 0) atomicAdd(&s.count[s.label[lane]], 1);
  }

  __device__ void operator()() {
    float sums[Tile::kSteps][Tile::kBlocks][4] = {};
    double energy = 0;
    int32_t changed = 0;
    int doubts = 0;
    for (int k = threadIdx.x; k < kClusters; k += Tile::kThreads) s.count[k] = 0;
    const int64_t tiles = (p.taken + kRows - 1) / kRows;
    const int64_t mine = team < tiles ? (tiles - team + w.teams - 1) / w.teams : 0;
    {
      typename Tile::Centers centers;
      centers.read(w, first_column);
      for (int i = 0; i < Tile::kStages - 1; ++i) i < mine ? load(i, team + int64_t(i) * w.teams) : commit_copies();
      for (int64_t i = 0; i < mine; ++i) {
        const int64_t tile = team + i * w.teams, next = i + Tile::kStages - 1;
        wait_for_copies<Tile::kStages - 2>();
        __syncthreads();  // this tile is here for everyone, and the one before is done with
        next < mine ? load(next % Tile::kStages, team + next * w.teams) : commit_copies();
        const int64_t position = tile * kRows + rank * share + threadIdx.x;
        if (p.labels && int(threadIdx.x) < share && int(threadIdx.x) + rank * share < kRows && position < p.taken)
          s.before[threadIdx.x] = p.labels[position];
        Tile::scores(s, i % Tile::kStages, centers);
        __syncthreads();
        exchange();
        cluster_barrier();
        decide(tile, energy, changed);
        cluster_barrier();
        if (warp == 0) note_doubts(tile, doubts);
        count();
        Tile::add(s, i % Tile::kStages, sums);
      }
    }
    if (threadIdx.x == 0) s.doubts = doubts;
    __threadfence();
    cluster_barrier();  // lists are whole
    doubts = s.doubts;
    settle(doubts, changed);
    for (int first = 0; first < doubts; first += kRows) {
      const Doubt* list = w.doubts + team * w.team_rows + first;
      wait_for_copies<0>();
      __syncthreads();
      Tile::load(s, 0, p, first_column, [&](int r) { return first + r < doubts ? row_at(list[r].position) : -1; });
      if (threadIdx.x < kRows) s.label[threadIdx.x] = first + int(threadIdx.x) < doubts ? list[threadIdx.x].label : -2;
      wait_for_copies<0>();
      __syncthreads();
      count();
      Tile::add(s, 0, sums);
    }
    wait_for_copies<0>();
    Tile::store(w, team, first_column, sums);
    if (lane == 0) {
      s.energy[warp] = energy;
      s.changed[warp] = changed;
    }
    __syncthreads();
    if (rank == 0)
      for (int k = threadIdx.x; k < kClusters; k += Tile::kThreads) w.slot_counts[team * kClusters + k] = s.count[k];
    if (threadIdx.x == 0) {
      int64_t all = 0;
      energy = 0;
      for (int i = 0; i < kWarps; ++i) {
        energy += s.energy[i];
        all += s.changed[i];
      }
      w.energy[blockIdx.x] = energy;
      w.changed[blockIdx.x] = all;
      w.doubtful[blockIdx.x] = rank == 0 ? doubts : 0;
    }
  }
};

// What follows a pass of Lloyd's algorithm; whether to go on. An empty cluster is left to the host, centres untouched.
template <class Tile>
__device__ bool lloyd(typename Tile::Shared& s, const Problem& p, const Workspace& w, Status& status, uint32_t& turn) {
  using Finish = kmeans::Finish<Tile>;
  for (int k = 0; k < p.clusters; ++k)
    if (s.count[k] == 0) {
      status.outcome = kEmptyCluster;
      return false;
    }
  Finish::renew(s, p, w, [&](int k, int, double sum, double) { return sum / s.count[k]; });
  ++status.iterations;
  grid_barrier(w.barrier, turn);
  status.shift = Finish::sum_of_columns(s, w.shifts, w.groups);
  if (s.whole_changed == 0) status.outcome = kLabelsStay;
  else if (status.shift <= p.tolerance) status.outcome = kWithinTolerance;
  return status.outcome == kRanOut;
}

// What follows a mini-batch: c <- (n c + sum of its rows) / (n + how many), with n the rows counted so far (Sculley 2010).
template <class Tile>
__device__ bool mini_batch(typename Tile::Shared& s, const Problem& p, const Workspace& w, Status& status, uint32_t& turn,
                           int step, const int64_t* order) {
  using Finish = kmeans::Finish<Tile>;
  using T = typename Tile::T;
  constexpr int kClusters = Tile::kClusters;
  const double* before = w.totals + step % 2 * kClusters;
  status.seen += p.taken;
  bool due = status.seen >= 10 * int64_t(p.clusters);
  for (int k = 0; k < p.clusters; ++k) due |= before[k] == 0;
  if (due) status.seen = 0;
  if (threadIdx.x < kClusters) s.totals[threadIdx.x] = before[threadIdx.x] + s.count[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) Finish::reassign(s, p, due);
  __syncthreads();
  Finish::renew(s, p, w, [&](int k, int column, double sum, double old) {
    if (s.chosen[k] >= 0) {
      const int64_t row = order ? order[s.chosen[k]] : s.chosen[k];
      return double(to_float(static_cast<const T*>(p.x)[row * p.pitch + column]));
    }
    return s.count[k] ? (old * before[k] + sum) / s.totals[k] : old;
  });
  if (blockIdx.x == 0 && threadIdx.x < kClusters)
    w.totals[(step + 1) % 2 * kClusters + threadIdx.x] = s.next_totals[threadIdx.x];
  ++status.iterations;
  grid_barrier(w.barrier, turn);
  status.shift = Finish::sum_of_columns(s, w.shifts, w.groups);
  double inertia = status.energy - 2 * Finish::sum_of_columns(s, w.products, w.groups);
  for (int k = 0; k < p.clusters; ++k) inertia += s.count[k] * s.norms[k];
  inertia = max(inertia, 0.0) / double(p.taken);
  if (status.iterations == 1) return true;  // that inertia is the initialisation's
  status.smoothed = status.smoothed < 0 ? inertia : status.smoothed * (1 - p.smoothing) + inertia * p.smoothing;
  if (p.tolerance > 0 && status.shift <= p.tolerance) {
    status.outcome = kWithinTolerance;
    return false;
  }
  status.stale = status.least < 0 || status.smoothed < status.least ? 0 : status.stale + 1;
  if (status.stale == 0) status.least = status.smoothed;
  if (p.patience > 0 && status.stale >= p.patience) status.outcome = kNoImprovement;
  return status.outcome == kRanOut;
}

// All iterations; two blocks of four warps on a multiprocessor hide each other's barriers.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads == 128 ? 2 : 1) onepass(Problem p, Workspace w) {
  RSF_SHARED(raw);
  auto& s = *reinterpret_cast<typename Tile::Shared*>(raw);
  using Finish = kmeans::Finish<Tile>;
  Pass<Tile> pass(s, p, w);
  Status status = *p.status;
  uint32_t turn = 0;
  int step = 0;
  Finish::publish_given(s, p, w);
  grid_barrier(w.barrier, turn);
  for (bool going = true; going && step < p.iterations;) {
    if (p.order) pass.order = p.order + step * p.taken;
    Finish::bias(s, p, w);
    pass();
    grid_barrier(w.barrier, turn);
    Finish::columns(s, w.slot_counts, w.teams, s.count);
    Finish::whole(s, w, status);
    if (p.mode == kStep) {
      Finish::hand_over(s, p, w);
      going = false;
    } else {
      going = p.mode == kLloyd ? lloyd<Tile>(s, p, w, status, turn)
                               : mini_batch<Tile>(s, p, w, status, turn, step, pass.order);
    }
    ++step;
  }
  if (p.mode == kMiniBatch && blockIdx.x == 0)
    for (int k = threadIdx.x; k < p.clusters; k += Tile::kThreads) p.counts[k] = w.totals[step % 2 * Tile::kClusters + k];
  grid_barrier(w.barrier, turn);  // everyone has read the status that is replaced
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.status = status;
}

}  // namespace rsf::kmeans
