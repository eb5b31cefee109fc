// The instructions that kernels are made of, under names of ours: as PTX for a GPU, as plain C++ under emulation.
#pragma once
#include <cstdint>
#ifndef RSF_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace rsf {

struct Bf16 {
  static constexpr bool kIsHalf = false;
  uint16_t bits;
};
struct Fp16 {
  static constexpr bool kIsHalf = true;
  uint16_t bits;
};

#ifndef RSF_EMULATION

#define RSF_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float to_float(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float to_float(Fp16 v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ Bf16 to_bf16(float v) { return {__bfloat16_as_ushort(__float2bfloat16_rn(v))}; }
__device__ __forceinline__ Fp16 to_fp16(float v) { return {__half_as_ushort(__float2half_rn(v))}; }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// c += a b for a 16 x 16, b 16 x 8, in fp32.
__device__ __forceinline__ void multiply(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory in the background, zeros where there is nothing to read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
#else  // a block is its own cluster before sm_90
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned) {
  return shared;
}
#endif

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void relax() { __nanosleep(20); }
__device__ __forceinline__ uint32_t load_pair(const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

#else

#define RSF_SHARED(name) unsigned char* name = emulation::shared_memory()

inline float to_float(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline float to_float(Fp16 v) {
  _Float16 h;
  std::memcpy(&h, &v.bits, 2);
  return float(h);
}
inline float to_float(float v) { return v; }
inline Bf16 to_bf16(float v) {
  const uint32_t u = __float_as_uint(v);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline Fp16 to_fp16(float v) {
  const _Float16 h = _Float16(v);
  Fp16 r;
  std::memcpy(&r.bits, &h, 2);
  return r;
}

inline uint16_t matrix_element(const unsigned char (&board)[32][64], unsigned matrix, unsigned row, unsigned column) {
  return emulation::shown<const uint16_t*>(board, matrix * 8 + row)[column];
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto& board = emulation::show(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m)
    r[m] = matrix_element(board, m, lane / 4, lane % 4 * 2) |
           uint32_t(matrix_element(board, m, lane / 4, lane % 4 * 2 + 1)) << 16;
  emulation::meet(emulation::my_warp().meeting, false);  // nobody writes what another still reads
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto& board = emulation::show(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m)
    r[m] = matrix_element(board, m, lane % 4 * 2, lane / 4) |
           uint32_t(matrix_element(board, m, lane % 4 * 2 + 1, lane / 4)) << 16;
  emulation::meet(emulation::my_warp().meeting, false);
}

inline float truncated(double exact) {  // to fp32, towards zero, as tensor cores do
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafterf(near, 0.0f) : near;
}
template <class T>
inline T half_of(uint32_t pair, unsigned high) {
  return T{uint16_t(pair >> (16 * high))};
}
inline int exponent_of(Bf16 v) { return std::max(v.bits >> 7 & 0xff, 1) - 127; }
inline int exponent_of(Fp16 v) { return std::max(v.bits >> 10 & 0x1f, 1) - 15; }
struct Operands {
  uint32_t a[4], b[2];
};
// c and eight products are aligned to the largest of them, cut off one bit below fp32 and added, as tests of tensor
// cores have found them to do (Fasi, Higham, Mikaitis, Pranesh 2021).
template <class T>
inline float eight_at_once(float c, const T (&left)[8], const T (&right)[8]) {
  double terms[9] = {c}, plain = c;
  int largest = c == 0 ? -2000 : std::ilogb(c);
  for (unsigned k = 0; k < 8; ++k) {
    plain += terms[k + 1] = double(to_float(left[k])) * double(to_float(right[k]));
    if (terms[k + 1] != 0) largest = std::max(largest, exponent_of(left[k]) + exponent_of(right[k]));
  }
  if (!std::isfinite(plain) || largest == -2000) return float(plain);
  const double unit = std::ldexp(1.0, largest - 24);
  double sum = 0;
  for (double term : terms) sum += std::trunc(term / unit);
  return truncated(sum * unit);
}
template <class T>
inline void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto& board = emulation::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned half = 0; half < 2; ++half) {
      T left[8], right[8];
      for (unsigned k = 0; k < 8; ++k) {
        left[k] = half_of<T>(emulation::shown<Operands>(board, row % 8 * 4 + k / 2).a[row / 8 + half * 2], k % 2);
        right[k] = half_of<T>(emulation::shown<Operands>(board, column * 4 + k / 2).b[half], k % 2);
      }
      c[i] = eight_at_once(c[i], left, right);
    }
  }
}

inline void copy_async(void* shared, const void* global, bool inside) {
  emulation::races::copy(inside ? global : nullptr, shared, 16, true);
  const emulation::races::Mute mute;
  std::memset(shared, 0xff, 16);  // nothing to see before it is waited for
  emulation::me().groups.back().push_back({shared, inside ? global : nullptr, 16});
}
inline void commit_copies() {
  const emulation::races::Mute mute;
  emulation::me().groups.emplace_back();
}
template <int kPending>
inline void wait_for_copies() {
  const emulation::races::Mute mute;
  auto& groups = emulation::me().groups;  // the last one is still open
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) {
      emulation::races::copy(copy.from, copy.to, copy.bytes, false);
      copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

RSF_UNWATCHED inline unsigned cluster_rank() { return emulation::me().block->rank; }
RSF_UNWATCHED inline unsigned cluster_size() { return emulation::me().block->cluster->size; }
inline void cluster_barrier() { emulation::meet(emulation::me().block->cluster->meeting); }
template <class T>
RSF_UNWATCHED inline T* in_block(T* shared, unsigned rank) {
  auto* block = emulation::me().block;
  auto offset = reinterpret_cast<unsigned char*>(shared) - block->shared;
  return reinterpret_cast<T*>(block->cluster->blocks[rank]->shared + offset);
}
inline uint32_t load_acquire(const uint32_t* p) {
  emulation::races::touch(p, 4, emulation::races::kAtomic, emulation::races::kAcquire);
  const emulation::races::Mute mute;
  return *reinterpret_cast<const volatile uint32_t*>(p);
}
inline void relax() { emulation::yield(); }
inline uint32_t load_pair(const uint16_t* p) { return p[0] | uint32_t(p[1]) << 16; }

#endif

// Waits for every block of a grid that is resident as a whole. `counter` starts at 0 and only grows.
__device__ __forceinline__ void grid_barrier(uint32_t* counter, uint32_t& turn) {
  __syncthreads();
  ++turn;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (load_acquire(counter) < turn * gridDim.x) relax();
    __threadfence();
  }
  __syncthreads();
}

}  // namespace rsf
