// A tile of rows: scores against all centres on tensor cores, and sums by label on tensor cores.
//
// Each warp owns 16 kSteps columns of all rows. Its part of the centres and its part of the sums stay in registers, so
// a row is read from memory once and from shared memory twice. Fragment layouts are those of mma.m16n8k16.
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

  struct Shared {
    T x[kStages][kRows * kPitch];
    float partial[kWarps][kRows * kScorePitch];
    float exchange[(kRows + 8) * kScorePitch];  // rows in up to 8 equal shares
    float bias[kClusters];
    double numbers[2][kThreads];
    double norms[kClusters], totals[kClusters], next_totals[kClusters], means[kGroup];
    uint64_t candidates[kRows];
    int64_t before[kRows];
    double energy[kWarps];
    int32_t label[kRows], count[kClusters], chosen[kClusters], changed[kWarps];
    int32_t doubts;
    float by_norm, always;
    int64_t whole_changed, whole_doubtful;
    double whole_energy;
  };

  // Columns of a slice to a stage; `row_of(r)` is the row of x, negative where the tile has none.
  template <class RowOf>
  __device__ static __forceinline__ void load(Shared& s, int stage, const Problem& p, int first_column, RowOf row_of) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = kSlice / kPiece;
    const T* x = static_cast<const T*>(p.x);
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int r = i / kPieces, column = i % kPieces * kPiece;
      const int64_t row = row_of(r);
      const bool inside = row >= 0 && first_column + column < p.width;
      copy_async(&s.x[stage][r * kPitch + column], inside ? x + row * p.pitch + first_column + column : x, inside);
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
  __device__ static __forceinline__ void scores(Shared& s, int stage, const Centers& centers) {
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
  __device__ static __forceinline__ void add(Shared& s, int stage, float (&sums)[kSteps][kBlocks][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int block[kRows / 16][4];  // which eight clusters the label is in, if it is this lane's of them
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int label = s.label[k * 16 + row_of_index(lane % 4 * 2 + i % 2) + i / 2 * 8];
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
};

}  // namespace rsf::kmeans
