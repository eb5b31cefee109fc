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

#define RSF_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

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

// ---- a warpgroup's own barriers and products (sm_90) ------------------------------------------------------------

__device__ __forceinline__ void group_barrier(int id, int threads) {  // id 0 is __syncthreads()
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// The barrier at the same place in another block of the cluster; what this thread has seen written comes before.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, unsigned rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
#endif

// What threads have written to shared memory, for products that read it by descriptor.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
#define RSF_WGMMA_32(TYPE, TRANSPOSED)                                                                            \
  asm volatile(                                                                                                  \
      "{ .reg .pred p; setp.ne.b32 p, %18, 0;"                                                                   \
      " wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                               \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, " TRANSPOSED ", 0; }"        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),          \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])     \
      : "l"(a), "l"(b), "r"(int(add)))
#define RSF_OUT_8(i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RSF_WGMMA_64(TYPE, TRANSPOSED)                                                                            \
  asm volatile(                                                                                                  \
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;"                                                                   \
      " wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                               \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"   \
      "%28,%29,%30,%31}, %32, %33, p, 1, 1, " TRANSPOSED ", 0; }"                                                \
      : RSF_OUT_8(0), RSF_OUT_8(8), RSF_OUT_8(16), RSF_OUT_8(24)                                                 \
      : "l"(a), "l"(b), "r"(int(add)))
#define RSF_WGMMA_128(TYPE, TRANSPOSED)                                                                           \
  asm volatile(                                                                                                  \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;"                                                                   \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                              \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"   \
      "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"   \
      "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, " TRANSPOSED ", 0; }"                        \
      : RSF_OUT_8(0), RSF_OUT_8(8), RSF_OUT_8(16), RSF_OUT_8(24), RSF_OUT_8(32), RSF_OUT_8(40), RSF_OUT_8(48),   \
        RSF_OUT_8(56)                                                                                            \
      : "l"(a), "l"(b), "r"(int(add)))
// d = a b (+ d) for a 64 x 16 and b 16 x n, both in shared memory; done when waited for.
template <bool kTransposed, class Part, int kHalf>
__device__ __forceinline__ void multiply_group(Part, float (&d)[kHalf], uint64_t a, uint64_t b, bool add) {
  constexpr bool kHalfs = sizeof(Part) == 2 && Part::kIsHalf;
  if constexpr (kHalf == 16 && kHalfs && kTransposed) RSF_WGMMA_32("f16", "1");
  if constexpr (kHalf == 16 && !kHalfs && kTransposed) RSF_WGMMA_32("bf16", "1");
  if constexpr (kHalf == 32 && kHalfs && kTransposed) RSF_WGMMA_64("f16", "1");
  if constexpr (kHalf == 32 && !kHalfs && kTransposed) RSF_WGMMA_64("bf16", "1");
  if constexpr (kHalf == 32 && kHalfs && !kTransposed) RSF_WGMMA_64("f16", "0");
  if constexpr (kHalf == 32 && !kHalfs && !kTransposed) RSF_WGMMA_64("bf16", "0");
  if constexpr (kHalf == 64 && kHalfs && !kTransposed) RSF_WGMMA_128("f16", "0");
  if constexpr (kHalf == 64 && !kHalfs && !kTransposed) RSF_WGMMA_128("bf16", "0");
}
#endif

#else

#define RSF_SHARED(name) unsigned char* name = emulation::me().block->shared

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
  const unsigned lane = emulation::me().thread % 32;
  for (unsigned m = 0; m < 4; ++m)
    r[m] = matrix_element(board, m, lane / 4, lane % 4 * 2) |
           uint32_t(matrix_element(board, m, lane / 4, lane % 4 * 2 + 1)) << 16;
  __syncwarp();  // nobody writes what another still reads
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto& board = emulation::show(row);
  const unsigned lane = emulation::me().thread % 32;
  for (unsigned m = 0; m < 4; ++m)
    r[m] = matrix_element(board, m, lane % 4 * 2, lane / 4) |
           uint32_t(matrix_element(board, m, lane % 4 * 2 + 1, lane / 4)) << 16;
  __syncwarp();
}

inline float truncated(double exact) {  // to fp32, towards zero, as tensor cores do
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafterf(near, 0.0f) : near;
}
template <class T>
inline float half_of(uint32_t pair, unsigned high) {
  return to_float(T{uint16_t(pair >> (16 * high))});
}
struct Operands {
  uint32_t a[4], b[2];
};
template <class T>
inline void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto& board = emulation::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = emulation::me().thread % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const auto left = emulation::shown<Operands>(board, row % 8 * 4 + k % 8 / 2);
      const auto right = emulation::shown<Operands>(board, column * 4 + k % 8 / 2);
      sum += double(half_of<T>(left.a[row / 8 + k / 8 * 2], k % 2)) * double(half_of<T>(right.b[k / 8], k % 2));
    }
    c[i] = truncated(sum);
  }
}

inline void copy_async(void* shared, const void* global, bool inside) {
  std::memset(shared, 0xff, 16);  // nothing to see before it is waited for
  emulation::me().groups.back().push_back({shared, inside ? global : nullptr, 16});
}
inline void commit_copies() { emulation::me().groups.emplace_back(); }
template <int kPending>
inline void wait_for_copies() {
  auto& groups = emulation::me().groups;  // the last one is still open
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front())
      copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    groups.erase(groups.begin());
  }
}

inline unsigned cluster_rank() { return emulation::me().block->rank; }
inline unsigned cluster_size() { return emulation::me().block->cluster->blocks.size(); }
inline void cluster_barrier() { emulation::meet(emulation::me().block->cluster->meeting); }
template <class T>
inline T* in_block(T* shared, unsigned rank) {
  auto* block = emulation::me().block;
  auto offset = reinterpret_cast<unsigned char*>(shared) - block->shared;
  return reinterpret_cast<T*>(block->cluster->blocks[rank]->shared + offset);
}
inline uint32_t load_acquire(const uint32_t* p) { return *reinterpret_cast<const volatile uint32_t*>(p); }
inline void relax() { emulation::yield(); }
inline uint32_t load_pair(const uint16_t* p) { return p[0] | uint32_t(p[1]) << 16; }

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulation::me().block->shared);
}
inline void group_barrier(int id, int threads) {
  auto& meeting = emulation::me().block->groups[id];
  meeting.expected = threads;
  emulation::meet(meeting);
}
struct Barrier {  // in the 64 bits of a real one
  uint16_t arrivals, arrived;
  uint32_t turn;
};
inline void barrier_init(uint64_t* barrier, unsigned arrivals) {
  *reinterpret_cast<Barrier*>(barrier) = {uint16_t(arrivals), 0, 0};
}
inline void barrier_arrive(uint64_t* barrier, unsigned rank) {
  auto& there = *reinterpret_cast<Barrier*>(in_block(barrier, rank));
  ++emulation::state().progress;
  if (++there.arrived < there.arrivals) return;
  there.arrived = 0;
  ++there.turn;
}
inline void barrier_wait(uint64_t* barrier, unsigned parity) {
  while ((reinterpret_cast<volatile Barrier*>(barrier)->turn & 1) == parity) emulation::yield();
}
inline void publish_shared() {}
inline void products_begin() {}
inline void products_commit() {}
inline void products_wait() { emulation::settle(); }

// 16-bit element (row, k) of an operand in 128-byte swizzled rows, as its descriptor says.
inline uint16_t described(uint64_t descriptor, bool transposed, unsigned row, unsigned k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) std::abort();
  uint32_t at = transposed ? start + k / 8 * stride + k % 8 * 128 + row * 2 : start + row / 8 * stride + row % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  return *reinterpret_cast<uint16_t*>(emulation::me().block->shared + at);
}
template <bool kTransposed, class Part, int kHalf>
inline void multiply_group(Part, float (&d)[kHalf], uint64_t a, uint64_t b, bool add) {
  const unsigned lane = emulation::me().thread % 32, warp = emulation::me().thread / 32 % 4;
  std::vector<uint16_t> seen;
  const auto element = [&](uint64_t descriptor, bool transposed, unsigned row, unsigned k) {
    seen.push_back(described(descriptor, transposed, row, k));
    return double(to_float(Part{seen.back()}));
  };
  for (int i = 0; i < kHalf; ++i) {
    const unsigned row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = add ? d[i] : 0;
    for (unsigned k = 0; k < 16; ++k) sum += element(a, kTransposed, row, k) * element(b, false, column, k);
    d[i] = truncated(sum);
  }
  emulation::me().pending.push_back([=] {  // nobody may have written there before the product was waited for
    size_t at = 0;
    for (int i = 0; i < kHalf; ++i)
      for (unsigned k = 0; k < 16; ++k) {
        const unsigned row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (described(a, kTransposed, row, k) != seen[at++] || described(b, false, column, k) != seen[at++]) return false;
      }
    return true;
  });
}

#endif

// Where an operand lies whose rows are 128 bytes with their 16-byte pieces permuted (`swizzled`), eight rows to 1,024
// bytes, the first at a multiple of that; `stride`: bytes from eight rows to the next eight.
__device__ __forceinline__ uint64_t descriptor(const void* start, unsigned stride) {
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) * 16); }

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
