// Shared arrays and the few instructions that CUDA C++ has no name for. `emulate/` has the same names in C++.
#pragma once

#include <cuda_fp16.h>

// An array in shared memory; under emulation its accesses are checked.
template <class T> struct Shared {
    T *data;

    __device__ __forceinline__ T &operator[](unsigned index) const { return data[index]; }
    // A wider value that starts at element `index`, which must be aligned for it.
    template <class V> __device__ __forceinline__ V read(unsigned index) const { return *reinterpret_cast<const V *>(data + index); }
    template <class V> __device__ __forceinline__ void write(unsigned index, V value) const {
        *reinterpret_cast<V *>(data + index) = value;
    }
    // The array from element `offset` on.
    __device__ __forceinline__ Shared operator+(unsigned offset) const { return {data + offset}; }
    // The same bytes as another type.
    template <class V> __device__ __forceinline__ Shared<V> as() const { return {reinterpret_cast<V *>(data)}; }
    // For atomic operations.
    __device__ __forceinline__ T *address(unsigned index) const { return data + index; }
    // As instructions name it.
    __device__ __forceinline__ unsigned location(unsigned index) const {
        return static_cast<unsigned>(__cvta_generic_to_shared(data + index));
    }
};

// `count` elements of T per block, named `name`.
#define SHARED_ARRAY(T, name, count)                                                                                                  \
    __shared__ __align__(128) unsigned char name##_bytes[sizeof(T) * (count)];                                                        \
    const Shared<T> name = {reinterpret_cast<T *>(name##_bytes)}

// `count` elements of T in the launch's dynamic shared memory, from byte `offset` on.
template <class T> __device__ __forceinline__ Shared<T> dynamic_shared(unsigned offset, unsigned) {
    extern __shared__ __align__(128) unsigned char dynamic_bytes[];
    return {reinterpret_cast<T *>(dynamic_bytes + offset)};
}

// d = a b + c on 16x16 by 16x8 halves. With g = lane / 4, t = lane % 4, a register holding two neighbours along k, lower k first:
// a = (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); b = (k 2t, column g), (k 2t+8, column g);
// c, d = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d = a b + c on 16x32 by 32x8 signed bytes. A register holds four neighbours along k:
// a = (g, 4t), (g+8, 4t), (g, 4t+16), (g+8, 4t+16); b = (k 4t, column g), (k 4t+16, column g); c and d as above.
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const int (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Tiles of 8x8 16-bit elements out of shared memory: lane 8i+r gives the start of row r of tile i (the other lanes' `index` is not used
// by _x2), and to[i] becomes elements (lane/4, 2*(lane%4)) and the next of tile i; of its transpose with _trans.
template <class T> __device__ __forceinline__ void ldmatrix_x2(unsigned (&to)[2], const Shared<T> &from, unsigned index) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from.location(index))
                 : "memory");
}
template <class T> __device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const Shared<T> &from, unsigned index) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from.location(index))
                 : "memory");
}
template <class T> __device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&to)[2], const Shared<T> &from, unsigned index) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from.location(index))
                 : "memory");
}
template <class T> __device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&to)[4], const Shared<T> &from, unsigned index) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from.location(index))
                 : "memory");
}

// Starts a copy of 16 bytes from global to shared memory; bytes past `valid` become zero. Both sides are aligned to 16 bytes. The bytes
// are there for this thread after a cp_async_wait that covers them, for others after a barrier beyond that.
template <class T> __device__ __forceinline__ void cp_async_16(const Shared<T> &to, unsigned index, const void *from, unsigned valid = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(to.location(index)), "l"(__cvta_generic_to_global(from)), "r"(valid)
                 : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `under_way` groups of this thread are not done.
template <int under_way> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(under_way) : "memory");
}

// 16 bytes of global memory in one access; the address must be aligned to them.
__device__ __forceinline__ uint4 load_16(const void *from) { return __ldg(static_cast<const uint4 *>(from)); }
// As load_16, for what is read once: it is the first to leave the cache.
__device__ __forceinline__ uint4 load_16_streaming(const void *from) { return __ldcs(static_cast<const uint4 *>(from)); }
__device__ __forceinline__ void store_16(void *to, uint4 value) { *static_cast<uint4 *>(to) = value; }
