// A tile of rows: scores against all centres on tensor cores, and sums by label on tensor cores.
//
// Each warp owns 16 kSteps columns of all rows. Its part of the centres and its part of the sums stay in registers, so
// a row is read from memory once and from shared memory twice. Fragment layouts are those of mma.m16n8k16.
#pragma once
#include "team.cuh"

namespace rsf::kmeans {

template <class T_, int kBlocks_, int kSteps_, int kWarps_>
struct Tile {
  using T = T_;
  using Part = typename Kind<T>::Part;
  static constexpr int kBlocks = kBlocks_, kSteps = kSteps_, kWarps = kWarps_;
  static constexpr int kStages = 4;
  static constexpr int kClusters = kBlocks * 8;         // padded
  static constexpr int kSlice = kWarps * kSteps * 16;   // columns of a block
  static constexpr int kRows = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kPitch = kSlice + 8;             // rows begin in different banks
  static constexpr int kScorePitch = kClusters + 8;     // the first spare column holds the squared norm
  static constexpr int kParts = Kind<T>::kParts;

  static constexpr int kExchangeRows = kRows + 8;  // rows in up to 8 equal shares
  static constexpr int kMostMembers = 8, kBlocksPerSm = kWarps == 4 ? 2 : 1;
  // What is lost in a score, but for the team's sums, in 2^-22 of ||x|| ||c||. A product adds eight terms twice, each of
  // the nine cut off at 2^-24 of the largest and their sum at 2^-23: 5.5 of those, if all bits lost point one way.
  static constexpr int kAdds = 6 * kSteps * Kind<T>::kScoreProducts + kWarps;

  struct Stages {
    T x[kStages][kRows * kPitch];
    float partial[kWarps][kRows * kScorePitch];
  };

  // Columns of a slice to a stage; `row_of(r)` is the row of x, negative where the tile has none.
  template <class RowOf>
  __device__ static __forceinline__ void load(Team<Tile>& t, int stage, RowOf row_of) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = kSlice / kPiece;
    const T* x = static_cast<const T*>(t.p.x);
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int r = i / kPieces, column = i % kPieces * kPiece;
      const int64_t row = row_of(r);
      const bool inside = row >= 0 && t.first_column() + column < t.p.width;
      copy_async(&t.block.stages.x[stage][r * kPitch + column],
                 inside ? x + row * t.p.pitch + t.first_column() + column : x, inside);
    }
    commit_copies();
  }

  __device__ static __forceinline__ uint32_t pack(float first, float second) {
    return rounded(Part{}, first) | uint32_t(rounded(Part{}, second)) << 16;
  }
  // Replaces two numbers by what their rounding leaves.
  __device__ static __forceinline__ uint32_t take(float& first, float& second) {
    const uint32_t pair = pack(first, second);
    first -= value(Part{}, pair & 0xffff);
    second -= value(Part{}, pair >> 16);
    return pair;
  }

  // Rows m..m+15 and 16 columns of a stage as the left operand, in parts; adds the squares of rows l/4 and l/4 + 8.
  __device__ static __forceinline__ void rows_operand(const T* x, int m, int column, uint32_t (&a)[kParts][4],
                                                      float (&squares)[2]) {
    const int lane = threadIdx.x % 32;
    if constexpr (kParts == 1) {
      load_matrices(a[0], x + (m + lane % 16) * kPitch + column + lane / 16 * 8);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float first = value(Part{}, a[0][q] & 0xffff), second = value(Part{}, a[0][q] >> 16);
        squares[q % 2] += first * first + second * second;
      }
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const T* at = x + (m + lane / 4 + q % 2 * 8) * kPitch + column + lane % 4 * 2 + q / 2 * 8;
        float first = at[0], second = at[1];
        squares[q % 2] += first * first + second * second;
        a[0][q] = take(first, second);
        a[1][q] = pack(first, second);
      }
    }
  }

  // 16 columns and rows k..k+15 of a stage as the left operand: the transpose, in all parts.
  __device__ static __forceinline__ void columns_operand(const T* x, int k, int column, uint32_t (&a)[kParts][4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (kParts == 1) {
      load_matrices_transposed(a[0], x + (k + lane % 8 + lane / 16 * 8) * kPitch + column + lane / 8 % 2 * 8);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const T* at = x + (k + row_of_index(lane % 4 * 2) + q / 2 * 8) * kPitch + column + lane / 4 + q % 2 * 8;
        float first = at[0], second = at[(row_of_index(1) - row_of_index(0)) * kPitch];
        a[0][q] = take(first, second);
        a[1][q] = take(first, second);
        a[2][q] = pack(first, second);
      }
    }
  }
  // Which of 8 rows an index of the product stands for: sums do not care, and banks do.
  __device__ static __forceinline__ constexpr int row_of_index(int k) { return kParts == 1 ? k : k / 2 + k % 2 * 4; }

  // This warp's columns of the centres, right operands of the scores.
  struct Centers {
    uint32_t high[kSteps][kBlocks][2], low[kSteps][kBlocks][2];

    __device__ __forceinline__ void read(const Workspace& w, int first_column) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t at = int64_t(j * 8 + lane / 4) * w.padded_width + first_column + (warp * kSteps + s) * 16 +
                               lane % 4 * 2 + half * 8;
            high[s][j][half] = load_pair(w.high + at);
            low[s][j][half] = load_pair(w.low + at);
          }
    }
  };

  // This warp's part of the products of all rows with all centres, and of the rows' squared norms.
  __device__ static __forceinline__ void scores(Stages& s, int stage, const Centers& centers) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int m = 0; m < kRows; m += 16) {
      float sums[kBlocks][4] = {}, squares[2] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kParts][4];
        rows_operand(s.x[stage], m, (warp * kSteps + step) * 16, a, squares);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const auto& high = centers.high[step][j];
          const auto& low = centers.low[step][j];
          multiply(Part{}, sums[j], a[0], low[0], low[1]);
          if constexpr (kParts > 1) multiply(Part{}, sums[j], a[1], high[0], high[1]);
          multiply(Part{}, sums[j], a[0], high[0], high[1]);
        }
      }
      float* out = &s.partial[warp][(m + lane / 4) * kScorePitch];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) out[q / 2 * 8 * kScorePitch + j * 8 + lane % 4 * 2 + q % 2] = sums[j][q];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        squares[half] += __shfl_xor_sync(~0u, squares[half], 1);
        squares[half] += __shfl_xor_sync(~0u, squares[half], 2);
        if (lane % 4 == 0) out[half * 8 * kScorePitch + kClusters] = squares[half];
      }
    }
  }

  // Adds the rows of a stage to this warp's columns of the sums, each under its label; a negative label adds nothing.
  // Tensor cores truncate, so they add up one tile only and the long sum is rounded to nearest.
  __device__ static __forceinline__ void add(Stages& s, int stage, const int32_t* labels,
                                             float (&sums)[kSteps][kBlocks][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int block[kRows / 16][4];  // which eight clusters the label is in, if it is this lane's of them
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int label = labels[k * 16 + row_of_index(lane % 4 * 2 + i % 2) + i / 2 * 8];
        block[k][i] = label >= 0 && label % 8 == lane / 4 ? label / 8 : -1;
      }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float tile[kBlocks][4] = {};
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        uint32_t a[kParts][4];
        columns_operand(s.x[stage], k * 16, (warp * kSteps + step) * 16, a);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const uint32_t b0 = (block[k][0] == j ? one(Part{}) : 0) | (block[k][1] == j ? one(Part{}) << 16 : 0);
          const uint32_t b1 = (block[k][2] == j ? one(Part{}) : 0) | (block[k][3] == j ? one(Part{}) << 16 : 0);
#pragma unroll
          for (int part = kParts - 1; part >= 0; --part) multiply(Part{}, tile[j], a[part], b0, b1);
        }
      }
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[step][j][q] += tile[j][q];
    }
  }

  // This warp's columns of the sums to its team's slot.
  __device__ static __forceinline__ void store(const Workspace& w, int team, int first_column,
                                               const float (&sums)[kSteps][kBlocks][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          w.slots[(int64_t(team) * kClusters + j * 8 + lane % 4 * 2 + q % 2) * w.padded_width + first_column +
                  (warp * kSteps + step) * 16 + lane / 4 + q / 2 * 8] = sums[step][j][q];
  }

  // This block's scores of a tile, each to the block that decides its row.
  __device__ static void send(Team<Tile>& t) {
    for (int row = t.warp(); row < kRows; row += kWarps) {
      float* out = t.scores_of(row);
      for (int k = t.lane(); k <= kClusters; k += 32) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += t.block.stages.partial[i][row * kScorePitch + k];
        out[k] = sum;
      }
    }
  }

  __device__ static void pass(Team<Tile>& t) {
    Stages& stages = t.block.stages;
    float sums[kSteps][kBlocks][4] = {};
    const int mine = t.tiles();
    const auto begin = [&](int i) {
      const int64_t first = int64_t(t.team() + i * t.w.teams) * kRows;
      if (i >= mine) commit_copies();
      else load(t, i % kStages, [&](int r) { return first + r < t.p.taken ? t.row_at(first + r) : -1; });
    };
    t.begin();
    {
      Centers centers;
      centers.read(t.w, t.first_column());
      for (int i = 0; i < kStages - 1; ++i) begin(i);
      for (int i = 0; i < mine; ++i) {
        const int tile = t.team() + i * t.w.teams;
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this tile is here for everyone, and the one before is done with
        begin(i + kStages - 1);
        t.remember_labels(tile);
        scores(stages, i % kStages, centers);
        __syncthreads();
        send(t);
        cluster_barrier();
        t.decide(tile);
        cluster_barrier();
        t.note_doubts(tile);
        t.count();
        add(stages, i % kStages, t.s.label, sums);
      }
    }
    t.settle([&](auto row_of) {
      load(t, 0, row_of);
      wait_for_copies<0>();
      __syncthreads();
      t.count();
      add(stages, 0, t.s.label, sums);
    });
    wait_for_copies<0>();
    store(t.w, t.team(), t.first_column(), sums);
    t.report();
  }
};

}  // namespace rsf::kmeans
