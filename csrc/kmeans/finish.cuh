// Between two passes over the rows: sums of all teams in a fixed order, new centres, and what the next pass needs.
#pragma once
#include "team.cuh"

namespace rsf::kmeans {

template <class Tile>
struct Finish {
  using Shared = kmeans::Shared<Tile>;
  using Part = typename Tile::Part;
  static constexpr int kClusters = Tile::kClusters, kThreads = Tile::kThreads;
  static constexpr int kShares = kThreads / kClusters;  // threads that add up for one cluster

  // sum over i of parts[i][cluster], by all threads of a block in one order; for every cluster to `out`.
  template <class Number, class Sum>
  __device__ static void columns(Shared& s, const Number* parts, int count, Sum* out) {
    const int cluster = threadIdx.x % kClusters, share = threadIdx.x / kClusters;
    double sum = 0;
    if (share < kShares)
      for (int i = share; i < count; i += kShares) sum += double(parts[int64_t(i) * kClusters + cluster]);
    s.scratch.numbers[0][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kClusters) {
      sum = 0;
      for (int i = 0; i < kShares; ++i) sum += s.scratch.numbers[0][i * kClusters + threadIdx.x];
      out[threadIdx.x] = Sum(sum);
    }
    __syncthreads();
  }

  // The same number in every thread.
  __device__ static double sum_of_columns(Shared& s, const double* parts, int count) {
    columns(s, parts, count, s.scratch.numbers[1]);
    double sum = 0;
    for (int k = 0; k < kClusters; ++k) sum += s.scratch.numbers[1][k];
    __syncthreads();
    return sum;
  }

  template <class Number>
  __device__ static Number sum_of_teams(const Number* parts) {  // one warp, the same number in every lane
    Number sum = 0;
    for (unsigned i = threadIdx.x % 32; i < gridDim.x; i += 32) sum += parts[i];
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    return sum;
  }

  // Numbers of a pass that are no centre's.
  __device__ static void whole(Shared& s, const Workspace& w) {
    if (threadIdx.x < 32) {
      const double energy = sum_of_teams(w.energy);
      const int64_t changed = sum_of_teams(w.changed), doubtful = sum_of_teams(w.doubtful);
      if (threadIdx.x == 0) {
        s.status.energy = energy;
        s.status.doubtful += doubtful;
        s.whole_changed = changed;
      }
    }
    __syncthreads();
  }

  // What a score adds to its product, and how wrong a score can be: by_norm ||x|| + always.
  __device__ static void bias(Shared& s, const Problem& p, const Workspace& w) {
    columns(s, w.norms, w.groups, s.norms);
    columns(s, w.centered, w.groups, s.scratch.numbers[1]);
    if (threadIdx.x < 32) {
      double least = s.norms[0], largest = 0, widest = 0;
      for (int k = threadIdx.x; k < p.clusters; k += 32) least = min(least, s.norms[k]);
      for (int by = 16; by; by /= 2) least = min(least, __shfl_xor_sync(~0u, least, by));
      for (int k = threadIdx.x; k < kClusters; k += 32) {
        const double b = s.norms[k] - least - (p.subsidies && k < p.clusters ? p.subsidies[k] : 0.0);
        s.bias[k] = k < p.clusters ? float(b) : __uint_as_float(0x7f800000);
        if (k < p.clusters) {
          largest = max(largest, fabs(b));
          widest = max(widest, s.scratch.numbers[1][k]);
        }
      }
      for (int by = 16; by; by /= 2) {
        largest = max(largest, __shfl_xor_sync(~0u, largest, by));
        widest = max(widest, __shfl_xor_sync(~0u, widest, by));
      }
      // products of a warp, sums of warps and of blocks
      const double adds = Tile::kAdds + cluster_size() + 4;
      const double split = split_error<typename Tile::T>() + adds * 0x1p-22;
      if (threadIdx.x == 0) {
        s.by_norm = float(2.001 * (split * sqrt(widest) + split_floor(Part{}) * sqrt(double(p.width))));
        s.always = float(0x1p-21 * largest + 0x1p-100);
      }
    }
    __syncthreads();
  }

  // A group of columns of the centres, of which `fresh` holds (kClusters, kGroup), in the forms that scores need.
  __device__ static void publish(Shared& s, const Problem& p, const Workspace& w, int group, const float* fresh) {
    __syncthreads();
    if (threadIdx.x < kGroup) {
      double mean = 0;
      for (int k = 0; k < p.clusters; ++k) mean += double(fresh[k * kGroup + threadIdx.x]);
      s.means[threadIdx.x] = mean / p.clusters;
    }
    __syncthreads();
    const int k = threadIdx.x;
    if (k < kClusters) {
      double norm = 0, centered = 0;
      for (int c = 0; c < kGroup; ++c) {
        const double center = k < p.clusters ? double(fresh[k * kGroup + c]) : s.means[c], offset = center - s.means[c];
        const double scaled = offset * center_scale(Part{});
        const int64_t at = int64_t(k) * w.padded_width + group * kGroup + c;
        const uint16_t high = rounded(Part{}, float(scaled));
        w.high[at] = high;
        w.low[at] = rounded(Part{}, float(scaled - value(Part{}, high)));
        norm += center * center;
        centered += offset * offset;
      }
      w.norms[group * kClusters + k] = k < p.clusters ? norm : 0;
      w.centered[group * kClusters + k] = centered;
    }
    __syncthreads();
  }

  __device__ static void publish_given(Shared& s, const Problem& p, const Workspace& w) {
    float* fresh = s.scratch.fresh;
    for (int group = blockIdx.x; group < w.groups; group += gridDim.x) {
      for (int e = threadIdx.x; e < p.clusters * kGroup; e += kThreads) {
        const int column = group * kGroup + e % kGroup;
        fresh[e] = column < p.width ? p.centers[int64_t(e / kGroup) * p.width + column] : 0.0f;
      }
      publish(s, p, w, group, fresh);
    }
    if (p.mode == kMiniBatch && blockIdx.x == 0)
      for (int k = threadIdx.x; k < kClusters; k += kThreads) w.totals[k] = k < p.clusters ? p.counts[k] : 0;
  }

  // Sums of all teams in the order of the teams.
  __device__ static double whole_sum(const Workspace& w, int cluster, int column) {
    double sum = 0;
#pragma unroll 8
    for (int team = 0; team < w.teams; ++team)
      sum += double(w.slots[(int64_t(team) * kClusters + cluster) * w.padded_width + column]);
    return sum;
  }

  // New centres by `renewed(cluster, column, sum, old)`, and how far they moved.
  template <class Renewed>
  __device__ static void renew(Shared& s, const Problem& p, const Workspace& w, Renewed renewed) {
    float* fresh = s.scratch.fresh;
    for (int group = blockIdx.x; group < w.groups; group += gridDim.x) {
      double moved = 0, product = 0;
      for (int e = threadIdx.x; e < kClusters * kGroup; e += kThreads) {
        const int k = e / kGroup, column = group * kGroup + e % kGroup;
        fresh[e] = 0;
        if (k >= p.clusters || column >= p.width) continue;
        float& center = p.centers[int64_t(k) * p.width + column];
        const double sum = whole_sum(w, k, column), old = center;
        center = fresh[e] = float(renewed(k, column, sum, old));
        moved += (double(center) - old) * (double(center) - old);
        product += sum * old;
      }
      s.scratch.numbers[0][threadIdx.x] = moved;
      s.scratch.numbers[1][threadIdx.x] = product;
      __syncthreads();
      if (threadIdx.x < kClusters) {  // any fixed split of the threads' parts will do
        moved = product = 0;
        for (int i = threadIdx.x; i < kThreads; i += kClusters) {
          moved += s.scratch.numbers[0][i];
          product += s.scratch.numbers[1][i];
        }
        w.shifts[group * kClusters + threadIdx.x] = moved;
        w.products[group * kClusters + threadIdx.x] = product;
      }
      publish(s, p, w, group, fresh);
    }
  }

  // Sums and counts as they are, for a single step.
  __device__ static void hand_over(Shared& s, const Problem& p, const Workspace& w) {
    for (int group = blockIdx.x; group < w.groups; group += gridDim.x)
      for (int e = threadIdx.x; e < p.clusters * kGroup; e += kThreads) {
        const int column = group * kGroup + e % kGroup;
        if (column < p.width) p.sums[int64_t(e / kGroup) * p.width + column] = float(whole_sum(w, e / kGroup, column));
      }
    if (blockIdx.x == 0)
      for (int k = threadIdx.x; k < p.clusters; k += kThreads) p.counts[k] = s.count[k];
  }

  // Mini-batches: which clusters begin anew, and at which row of the batch; scikit-learn's rule. One thread.
  __device__ static void reassign(Shared& s, const Problem& p, bool due) {
    double most = 0, least_kept = -1;
    for (int k = 0; k < p.clusters; ++k) most = max(most, s.totals[k]);
    for (int k = 0; k < p.clusters; ++k) {
      s.chosen[k] = -1;
      s.next_totals[k] = s.totals[k];
    }
    if (!due || p.reassignment_ratio <= 0) return;
    int taken = 0;
    for (int k = 0; k < p.clusters; ++k) {
      const bool poor = s.totals[k] < p.reassignment_ratio * most;
      int64_t poorer = 0;  // of two equally poor the first comes first
      for (int other = 0; poor && other < p.clusters; ++other)
        poorer += s.totals[other] < s.totals[k] || (s.totals[other] == s.totals[k] && other < k);
      if (poor && poorer < p.taken / 2) s.chosen[k] = taken++;
      else if (least_kept < 0 || s.totals[k] < least_kept) least_kept = s.totals[k];
    }
    for (int k = 0; k < p.clusters; ++k)
      if (s.chosen[k] >= 0) s.next_totals[k] = max(least_kept, 0.0);
  }
};

}  // namespace rsf::kmeans
