// The C interface of the k-means kernels. Raw pointers to memory of one device, sizes, and a stream; nothing is kept.
// Functions return 0, a cudaError, or a negative code of errors.h.
#pragma once
#include <stdint.h>

#include "../common/errors.h"

// dtypes: 0 fp32, 1 fp16, 2 bf16.
typedef struct {
  const void* x;            // (rows, width), rows `pitch` elements apart; 16-byte aligned as are its rows
  const int64_t* order;     // rows in the order they are taken, (iterations, taken) for mode 2; null: as they lie
  float* centers;           // (clusters, width)
  const double* subsidies;  // (clusters), or null
  int64_t* labels;          // (taken), or null; what lies there is compared with
  float* sums;              // (clusters, width), mode 0
  double* counts;           // (clusters)
  void* status;             // 64 bytes, Status in problem.cuh
  int64_t pitch, taken;
  int32_t width, clusters, exact, mode, iterations, patience;
  double tolerance, smoothing, reassignment_ratio;
} RsfKMeans;

// Bytes of workspace for a launch on the current device, or a negative number.
RSF_EXPORT int64_t rsf_kmeans_workspace(int dtype, int64_t taken, int width, int clusters);

// One step (mode 0), Lloyd's algorithm (1) or mini-batches (2), in one launch. See onepass.cuh.
RSF_EXPORT int rsf_kmeans_onepass(int dtype, const RsfKMeans* problem, void* workspace, int64_t bytes, void* stream);
