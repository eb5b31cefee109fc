// The C interface of the exact size constraint: its device's half (subsidies.cu) and its host's (shortest_paths.cpp).
// All integers are int64; K clusters, N points. Functions return 0, a cudaError, or one of errors.h.
#pragma once
#include <stdint.h>

#include "../common/errors.h"

// On one device: gaps (K, N); lower, upper and subsidies (K); labels (N).

// Bytes of workspace for rsf_climb, or RSF_OUT_OF_RANGE.
RSF_EXPORT int64_t rsf_climb_workspace(int64_t clusters, int64_t points);

// Some rounds of the ascent: changes subsidies, and writes the labels chosen under them.
RSF_EXPORT int rsf_climb(int64_t clusters, int64_t points, int64_t rounds, const int64_t* gaps, const int64_t* lower,
                         const int64_t* upper, int64_t* subsidies, int64_t* labels, void* workspace, int64_t bytes,
                         void* stream);

// How many moves cost how many bits: adds to counts (64).
RSF_EXPORT int rsf_widths(int64_t clusters, int64_t points, const int64_t* gaps, const int64_t* subsidies,
                          const int64_t* labels, int64_t* counts, void* stream);

// Whether a point could move for at most reach: writes 0 or 1 for every point.
RSF_EXPORT int rsf_near(int64_t clusters, int64_t points, int64_t reach, const int64_t* gaps, const int64_t* subsidies,
                        const int64_t* labels, uint8_t* result, void* stream);

// On the host: gaps (P, K) of P of all points, and their labels (P); lower, upper, counts and subsidies (K). Changes
// counts, subsidies and labels. *ran_out is 0 when every size fits, and 1 when a decision hangs on points beyond reach;
// what was done so far stands.
RSF_EXPORT int rsf_shortest_paths(int64_t clusters, int64_t points, int64_t reach, const int64_t* lower,
                                  const int64_t* upper, const int64_t* gaps, int64_t* counts, int64_t* subsidies,
                                  int64_t* labels, int32_t* ran_out);
