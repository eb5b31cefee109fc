// One dtype a file, so that they compile side by side.
#include "plan.cuh"

int64_t rsf::kmeans::serve_fp32(const Call& call) { return serve_dtype<float>(call); }
