// k-means with one read of the rows an iteration, and all iterations in one launch.
//
//   l_i = argmin_k ||c_k||^2 - s_k - 2 x_i.(c_k - m),  m = mean_k c_k    (the nearest centre; ties: the lowest index)
//   S_k = sum_i [l_i = k] x_i,  n_k = sum_i [l_i = k]
//
// A team of blocks shares the columns and takes every so-many-th tile of rows. Labels equal a float64
// argmin: a row whose two best scores are closer than their error is put aside and decided in float64 after the tiles.
// Sums of a tile are added to sums in registers, those of all teams in the order of the teams: no atomics on floating
// point numbers, the same bits every time on one kind of GPU.
#pragma once
#include "finish.cuh"

namespace rsf::kmeans {

// What follows a pass of Lloyd's algorithm; whether to go on. An empty cluster is left to the host, centres untouched.
template <class Tile>
__device__ bool lloyd(Shared<Tile>& s, const Problem& p, const Workspace& w, uint32_t& turn) {
  using Finish = kmeans::Finish<Tile>;
  bool empty = false;
  for (int k = 0; k < p.clusters; ++k) empty |= s.count[k] == 0;
  if (empty) {
    if (threadIdx.x == 0) s.status.outcome = kEmptyCluster;
    return false;
  }
  Finish::renew(s, p, w, [&](int k, int, double sum, double) { return sum / s.count[k]; });
  grid_barrier(w.barrier, turn);
  const double shift = Finish::sum_of_columns(s, w.shifts, w.groups);
  const int outcome = s.whole_changed == 0 ? kLabelsStay : shift <= p.tolerance ? kWithinTolerance : kRanOut;
  if (threadIdx.x == 0) {
    ++s.status.iterations;
    s.status.shift = shift;
    s.status.outcome = outcome;
  }
  return outcome == kRanOut;
}

// What mini-batches remember of one, and whether to go on; scikit-learn's rule. One thread.
__device__ inline void judge(Status& status, const Problem& p, double inertia, double shift) {
  status.shift = shift;
  if (++status.iterations == 1) return;  // that inertia is the initialisation's
  status.smoothed = status.smoothed < 0 ? inertia : status.smoothed * (1 - p.smoothing) + inertia * p.smoothing;
  status.stale = status.least < 0 || status.smoothed < status.least ? 0 : status.stale + 1;
  if (status.stale == 0) status.least = status.smoothed;
  if (p.tolerance > 0 && shift <= p.tolerance) status.outcome = kWithinTolerance;
  else if (p.patience > 0 && status.stale >= p.patience) status.outcome = kNoImprovement;
}

// What follows a mini-batch: c <- (n c + sum of its rows) / (n + how many), with n the rows counted so far (Sculley 2010).
template <class Tile>
__device__ bool mini_batch(Shared<Tile>& s, const Problem& p, const Workspace& w, uint32_t& turn, int step,
                           const int64_t* order) {
  using Finish = kmeans::Finish<Tile>;
  using T = typename Tile::T;
  constexpr int kClusters = Tile::kClusters;
  const double* before = w.totals + step % 2 * kClusters;
  if (threadIdx.x < kClusters) {
    s.next_totals[threadIdx.x] = before[threadIdx.x];
    s.totals[threadIdx.x] = before[threadIdx.x] + s.count[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    s.status.seen += p.taken;
    bool due = s.status.seen >= 10 * int64_t(p.clusters);
    for (int k = 0; k < p.clusters; ++k) due |= s.next_totals[k] == 0;
    if (due) s.status.seen = 0;
    Finish::reassign(s, p, due);
  }
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
  grid_barrier(w.barrier, turn);
  const double shift = Finish::sum_of_columns(s, w.shifts, w.groups);
  const double product = Finish::sum_of_columns(s, w.products, w.groups);
  if (threadIdx.x == 0) {
    double inertia = s.status.energy - 2 * product;
    for (int k = 0; k < p.clusters; ++k) inertia += s.count[k] * s.norms[k];
    judge(s.status, p, max(inertia, 0.0) / double(p.taken), shift);
  }
  __syncthreads();
  return s.status.outcome == kRanOut;
}

// All iterations.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) onepass(Problem p, Workspace w) {
  RSF_SHARED(raw);
  auto& s = *reinterpret_cast<Shared<Tile>*>(raw);
  using Finish = kmeans::Finish<Tile>;
  if (threadIdx.x == 0) s.status = *p.status;
  Team<Tile> team(s, p, w);
  uint32_t turn = 0;
  int step = 0;
  Finish::publish_given(s, p, w);
  grid_barrier(w.barrier, turn);
  for (bool going = true; going && step < p.iterations;) {
    if (p.order) team.order = p.order + step * p.taken;
    Finish::bias(s, p, w);
    Tile::pass(team);
    grid_barrier(w.barrier, turn);
    Finish::columns(s, w.slot_counts, w.teams, s.count);
    Finish::whole(s, w);
    if (p.mode == kStep) {
      Finish::hand_over(s, p, w);
      going = false;
    } else {
      going = p.mode == kLloyd ? lloyd<Tile>(s, p, w, turn) : mini_batch<Tile>(s, p, w, turn, step, team.order);
    }
    ++step;
  }
  if (p.mode == kMiniBatch && blockIdx.x == 0)
    for (int k = threadIdx.x; k < p.clusters; k += Tile::kThreads) p.counts[k] = w.totals[step % 2 * Tile::kClusters + k];
  grid_barrier(w.barrier, turn);  // everyone has read the status that is replaced
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.status = s.status;
}

}  // namespace rsf::kmeans
