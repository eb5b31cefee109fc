// One way to start a kernel, on a GPU and under emulation.
#pragma once
#ifndef RSF_EMULATION
#include <cuda_runtime.h>
#endif
#include <cstddef>

namespace rsf {

constexpr int kTooManyAtOnce = 720;  // cudaErrorCooperativeLaunchTooLarge

struct Shape {
  unsigned blocks, threads;
  size_t shared = 0;     // bytes
  unsigned cluster = 1;  // blocks that share their memory
  bool together = false; // all blocks resident at once, so that they may wait for each other
};

// 0 or a cudaError.
template <class... Wanted, class... Given>
int launch(void (*kernel)(Wanted...), const Shape& shape, void* stream, Given... given) {
#ifdef RSF_EMULATION
  (void)stream;
  return emulation::launch(shape.blocks, shape.threads, shape.shared, shape.cluster, shape.together,
                           [=] { kernel(given...); });
#else
  if (shape.shared > 48 * 1024) {
    const auto code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.together) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...);
#endif
}

}  // namespace rsf
