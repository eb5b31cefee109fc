// What the one-pass kernels are given, and what they keep between their phases.
#pragma once
#include "../common/device.cuh"

namespace rsf::kmeans {

enum Mode : int { kStep = 0, kLloyd = 1, kMiniBatch = 2 };
enum Outcome : int { kRanOut = 0, kLabelsStay = 1, kWithinTolerance = 2, kEmptyCluster = 3, kNoImprovement = 4 };

struct Status {  // 64 bytes, read by the host once, after everything; mini-batches go on from it
  int32_t iterations, outcome;
  int64_t doubtful;  // rows decided in float64, over all iterations
  double energy;     // sum of squared norms of the rows of the last iteration
  double shift;      // squared distance that the centres moved in the last iteration
  double smoothed, least;  // mini-batches: smoothed inertia of a row, and the least so far; negative: none yet
  int64_t stale;           // mini-batches since then
  int64_t seen;            // rows since clusters were last looked at for reassignment
};

struct Problem {
  const void* x;            // rows of `pitch` elements, 16-byte aligned
  const int64_t* order;     // the rows that are taken in turn; null: 0, 1, 2, ...
  float* centers;           // (clusters, width), changed by kLloyd and kMiniBatch
  const double* subsidies;  // (clusters), or null
  int64_t* labels;          // (taken), or null
  float* sums;              // (clusters, width), for kStep
  double* counts;           // (clusters): of the step; what mini-batches have counted so far
  Status* status;
  int64_t pitch, taken;     // `taken`: rows of one iteration
  int32_t width, clusters, exact, mode, iterations, patience;  // patience: mini-batches without improvement; 0: no limit
  double tolerance, smoothing, reassignment_ratio;
};

// A row that tensor cores could not decide, and the centres among which it has to be.
struct Doubt {
  int64_t position, label;
  uint64_t candidates;
};

struct Workspace {
  float* slots;              // (teams, padded clusters, padded width) sums of each team of blocks
  int32_t* slot_counts;      // (teams, padded clusters)
  double* energy;            // (blocks)
  int64_t *changed, *doubtful;  // (blocks) labels that changed; rows decided in float64
  uint16_t *high, *low;      // (padded clusters, padded width) centres about their mean, in two parts
  double *norms, *centered, *shifts, *products;  // (groups, padded clusters) parts of sums over columns
  double* totals;            // (2, padded clusters) what mini-batches have counted, before and after a step
  Doubt* doubts;             // (teams, rows of a team)
  uint32_t* barrier;         // starts at 0
  int64_t team_rows;
  int32_t teams, groups, padded_width;
};

constexpr int kGroup = 16;  // columns of the centres that a block finishes at a time

}  // namespace rsf::kmeans
