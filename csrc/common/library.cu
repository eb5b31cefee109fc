// What rsfast/_extension.py asks of the library before it uses it.
#define RSF_ABI 1  // of all functions that Python calls; rsfast/_extension.py has the same number
#include "errors.h"

#define RSF_TEXT_OF(x) #x
#define RSF_TEXT(x) RSF_TEXT_OF(x)

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace {
__global__ void nothing() {}
}  // namespace
#endif

extern "C" {

int rsf_abi() { return RSF_ABI; }

// digest of the sources, given by the build
const char* rsf_sources() { return RSF_TEXT(RSF_SOURCES); }

// 0 where the current GPU can run the library's kernels, else a code of CUDA
int rsf_probe() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, nothing);
  if (code != cudaSuccess) (void)cudaGetLastError();  // or the next launch would report it
  return code;
#else
  return 0;
#endif
}

// what a code means that a function returned: CUDA's are positive, ours negative
const char* rsf_error(int code) {
  switch (code) {
    case 0: return "no error";
    case RSF_OUT_OF_RANGE: return "an argument is out of range";
    case RSF_WORKSPACE_TOO_SMALL: return "the workspace is too small";
    case RSF_NOT_SERVED: return "no kernel for these sizes on this GPU";
    case RSF_NO_MEMORY: return "not enough memory on the host";
    case RSF_STUCK: return "the threads of an emulated kernel wait for each other";
    case RSF_RACE: return "the threads of an emulated kernel race";
    case 35: return "no NVIDIA driver, or one older than the CUDA runtime of the library";
    case 100: return "no GPU is visible";
    case 209: return "the library was not built for this GPU";
  }
#ifdef __CUDACC__
  if (code > 0) return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
  return "an error without a name";
}

}  // extern "C"
