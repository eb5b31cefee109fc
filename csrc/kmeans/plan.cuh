// Which one-pass kernel serves a shape, with how many blocks, and where its workspace lies.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../common/launch.h"
#include "kmeans.h"
#include "onepass.cuh"
#include "tile.cuh"

namespace rsf::kmeans {

struct Call {
  const RsfKMeans* problem;  // null: only the size of the workspace is asked for
  void* workspace;
  int64_t bytes;
  void* stream;
  int64_t taken;
  int width, clusters;
};

inline Workspace carve(unsigned char* base, int clusters, int teams, int members, int groups, int padded_width,
                       int64_t team_rows, int64_t* bytes) {
  int64_t at = 0;
  auto part = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(base + at);
    at += (count * int64_t(sizeof(Element)) + 127) / 128 * 128;
  };
  Workspace w{};
  const int64_t blocks = int64_t(teams) * members, centers = int64_t(clusters) * padded_width;
  part(w.barrier, 32);  // first, so that it is easily cleared
  part(w.slots, teams * centers);
  part(w.slot_counts, int64_t(teams) * clusters);
  part(w.energy, blocks);
  part(w.changed, blocks);
  part(w.doubtful, blocks);
  part(w.high, centers);
  part(w.low, centers);
  for (double** sum : {&w.norms, &w.centered, &w.shifts, &w.products}) part(*sum, int64_t(groups) * clusters);
  part(w.totals, 2 * clusters);
  part(w.doubts, teams * team_rows);
  w.team_rows = team_rows;
  w.teams = teams;
  w.groups = groups;
  w.padded_width = padded_width;
  *bytes = at;
  return w;
}

// Teams of `members` blocks that fit on the device at once; 0: none.
template <class Tile>
int teams_at_once(int members) {
#ifdef RSF_EMULATION
  return members <= 8 ? 3 : 0;
#else
  constexpr int kShared = sizeof(Shared<Tile>);
  int device = 0, processors = 0, blocks = 0;
  cudaFuncAttributes loaded;
  if (cudaGetDevice(&device) != cudaSuccess || cudaFuncGetAttributes(&loaded, onepass<Tile>) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // asked of the code, not of the GPU: what the driver made from PTX of sm_80 knows nothing of clusters on any GPU
  if (members > 1 && loaded.ptxVersion < 90) return 0;
  if (cudaFuncSetAttribute(onepass<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) != cudaSuccess) return 0;
  if (members == 1) {
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, onepass<Tile>, Tile::kThreads, kShared) != cudaSuccess)
      return 0;
    return blocks * processors;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(members), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(members);
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = kShared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&blocks, onepass<Tile>, &config) == cudaSuccess ? blocks : 0;
#endif
}

template <class Tile>
int64_t serve(const Call& call) {
  static_assert(sizeof(Shared<Tile>) <= 227 * 1024, "no GPU gives a block so much shared memory");
  const int members = (call.width + Tile::kSlice - 1) / Tile::kSlice, padded_width = members * Tile::kSlice;
  const int64_t tiles = (call.taken + Tile::kRows - 1) / Tile::kRows;
  int teams = int(std::min<int64_t>(teams_at_once<Tile>(members), std::max<int64_t>(tiles, 1)));
  if (teams < 1) {
#ifndef RSF_EMULATION
    cudaGetLastError();  // what the questions left behind
#endif
    return RSF_NOT_SERVED;
  }
  auto* base = static_cast<unsigned char*>(call.workspace);
  int64_t bytes = 0;
  const auto work = [&] {
    const int64_t team_rows = (tiles + teams - 1) / teams * Tile::kRows;
    return carve(base, Tile::kClusters, teams, members, padded_width / kGroup, padded_width, team_rows, &bytes);
  };
  work();
  if (!call.problem) return bytes;
  const RsfKMeans& given = *call.problem;
  Problem p{};
  p.x = given.x;
  p.order = given.order;
  p.centers = given.centers;
  p.subsidies = given.subsidies;
  p.labels = given.labels;
  p.sums = given.sums;
  p.counts = given.counts;
  p.status = static_cast<Status*>(given.status);
  p.pitch = given.pitch;
  p.taken = given.taken;
  p.width = given.width;
  p.clusters = given.clusters;
  p.exact = given.exact;
  p.mode = given.mode;
  p.iterations = given.iterations;
  p.patience = given.patience;
  p.tolerance = given.tolerance;
  p.smoothing = given.smoothing;
  p.reassignment_ratio = given.reassignment_ratio;
  for (;; teams /= 2) {  // fewer are resident than the device promised where a tool that watches kernels takes room
    const Workspace w = work();
    if (bytes > call.bytes) return RSF_WORKSPACE_TOO_SMALL;
#ifdef RSF_EMULATION
    *w.barrier = 0;
#else
    if (int code = cudaMemsetAsync(w.barrier, 0, sizeof(uint32_t), static_cast<cudaStream_t>(call.stream))) return code;
#endif
    Shape shape;
    shape.blocks = teams * members;
    shape.threads = Tile::kThreads;
    shape.shared = sizeof(Shared<Tile>);
    shape.cluster = members;
    shape.together = true;
    const int code = launch(onepass<Tile>, shape, call.stream, p, w);
    if (code != kTooManyAtOnce || teams == 1) return code;
  }
}

// Up to 32 clusters by blocks of four warps, up to 64 by eight: so the sums fit the registers.
template <class T>
int64_t serve_dtype(const Call& call) {
  if (call.clusters < 1 || call.width < 1) return RSF_NOT_SERVED;
  if (call.clusters <= 32) {
    const int members = (call.width + 255) / 256;
    if (members > 8) return RSF_NOT_SERVED;
    switch ((call.width + 64 * members - 1) / (64 * members)) {
      case 1: return serve<Tile<T, 4, 1, 4>>(call);
      case 2: return serve<Tile<T, 4, 2, 4>>(call);
      case 3: return serve<Tile<T, 4, 3, 4>>(call);
      default: return serve<Tile<T, 4, 4, 4>>(call);
    }
  }
  constexpr bool kNarrow = std::is_same_v<T, Fp16>;  // its wider kernel would not fit the registers
  if (call.clusters > 64 || call.width > (kNarrow ? 1024 : 2048)) return RSF_NOT_SERVED;
  if constexpr (!kNarrow)
    if (call.width > 128) return serve<Tile<T, 8, 2, 8>>(call);
  return serve<Tile<T, 8, 1, 8>>(call);
}

int64_t serve_fp32(const Call& call);
int64_t serve_fp16(const Call& call);
int64_t serve_bf16(const Call& call);

}  // namespace rsf::kmeans
