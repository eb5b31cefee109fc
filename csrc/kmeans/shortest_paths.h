// Exact size constraint, the host's half: see shortest_paths.cpp.
#pragma once
#include <stdint.h>

// All arrays are on the host, int64, row-major; K clusters, P points of all that there are. counts (K), subsidies (K)
// and labels (P) are changed in place; gaps is (P, K). Returns 0, with *ran_out 0 when every size fits and 1 when a
// decision hangs on points beyond reach (what was done so far stands); or, with nothing changed, -1 where an argument
// is out of range; or -4 where memory is not enough.
extern "C" __attribute__((visibility("default"))) int rsf_shortest_paths(
    int64_t clusters, int64_t points, int64_t reach, const int64_t* lower, const int64_t* upper, const int64_t* gaps,
    int64_t* counts, int64_t* subsidies, int64_t* labels, int32_t* ran_out);
