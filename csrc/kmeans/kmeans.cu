#include "kmeans.h"

#include "plan.cuh"

namespace {

int64_t serve(int dtype, const rsf::kmeans::Call& call) {
  switch (dtype) {
    case 0: return rsf::kmeans::serve_fp32(call);
    case 1: return rsf::kmeans::serve_fp16(call);
    case 2: return rsf::kmeans::serve_bf16(call);
    default: return RSF_NOT_SERVED;
  }
}

}  // namespace

int64_t rsf_kmeans_workspace(int dtype, int64_t taken, int width, int clusters) {
  return serve(dtype, {nullptr, nullptr, 0, nullptr, taken, width, clusters});
}

int rsf_kmeans_onepass(int dtype, const RsfKMeans* problem, void* workspace, int64_t bytes, void* stream) {
  return int(serve(dtype, {problem, workspace, bytes, stream, problem->taken, problem->width, problem->clusters}));
}
