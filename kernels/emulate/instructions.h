// The C++ meaning of the instructions that kernels use through named wrappers. `kernels/instructions.cuh` has their PTX, with the same
// names and arguments, and says what each does.
#pragma once

#include "memory.h"

namespace emulate {

template <class T, int N> struct Registers { T of[N]; };

template <int N, class T> inline Registers<T, N> pack(const T (&values)[N]) {
    Registers<T, N> packed;
    std::memcpy(packed.of, values, sizeof packed.of);
    return packed;
}

inline float half_of(unsigned both, unsigned which) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(both >> (16 * which))));
}

inline void check_aligned(const char *what, const void *at) {
    if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) Machine::current().fail("%s: the address is not aligned to 16 bytes", what);
}

// Loads 8x8 tiles of 16-bit elements: lane 8i+r names row r of tile i, and gets elements (lane/4, 2*(lane%4)) and its neighbour of each.
template <int N, class T>
inline void load_tiles(const char *what, unsigned (&to)[N], const Shared<T> &from, unsigned index, bool transposed, Site site) {
    const unsigned lane = Machine::current().lane();
    Registers<std::uint16_t, 8> row{};
    if (lane < 8 * N) {
        const T *at = from.at(index, 16, 16);
        Machine::current().touch(at, 16, Access::read);
        std::memcpy(row.of, at, 16);
    }
    const auto rows = gather_warp(what, row, site);
    for (unsigned tile = 0; tile < N; ++tile) {
        unsigned pair = 0;
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned r = transposed ? 2 * (lane % 4) + i : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + i;
            pair |= static_cast<unsigned>(rows[8 * tile + r].of[c]) << (16 * i);
        }
        to[tile] = pair;
    }
}

}  // namespace emulate

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], EMULATE_SITE) {
    const unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto all = emulate::gather_warp("mma_m16n8k16_f16", emulate::pack(own), site);
    const unsigned lane = emulate::Machine::current().lane(), group = lane / 4, part = lane % 4;
    emulate::Registers<unsigned, 6> left[4], right[2][4];
    for (unsigned i = 0; i < 4; ++i) {
        left[i] = all[4 * group + i];
        right[0][i] = all[4 * (2 * part) + i];
        right[1][i] = all[4 * (2 * part + 1) + i];
    }
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned lower = i / 2, column = i % 2;
        double sum = c[i];
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned from = k % 8 / 2, upper = k / 8, which = k % 2;
            const float x = emulate::half_of(left[from].of[lower + 2 * upper], which);
            const float y = emulate::half_of(right[column][from].of[4 + upper], which);
            sum += static_cast<double>(x) * y;
        }
        d[i] = static_cast<float>(sum);
    }
}

inline void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const int (&c)[4], EMULATE_SITE) {
    const unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto all = emulate::gather_warp("mma_m16n8k32_s8", emulate::pack(own), site);
    const unsigned lane = emulate::Machine::current().lane(), group = lane / 4, part = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned lower = i / 2, column = 2 * part + i % 2;
        int sum = c[i];
        for (unsigned quarter = 0; quarter < 8; ++quarter) {
            const unsigned from = quarter % 4, upper = quarter / 4;
            const unsigned left = all[4 * group + from].of[lower + 2 * upper], right = all[4 * column + from].of[4 + upper];
            sum = __dp4a(static_cast<int>(left), static_cast<int>(right), sum);
        }
        d[i] = sum;
    }
}

template <class T> inline void ldmatrix_x2(unsigned (&to)[2], const Shared<T> &from, unsigned index, EMULATE_SITE) {
    emulate::load_tiles("ldmatrix_x2", to, from, index, false, site);
}
template <class T> inline void ldmatrix_x4(unsigned (&to)[4], const Shared<T> &from, unsigned index, EMULATE_SITE) {
    emulate::load_tiles("ldmatrix_x4", to, from, index, false, site);
}
template <class T> inline void ldmatrix_x2_trans(unsigned (&to)[2], const Shared<T> &from, unsigned index, EMULATE_SITE) {
    emulate::load_tiles("ldmatrix_x2_trans", to, from, index, true, site);
}
template <class T> inline void ldmatrix_x4_trans(unsigned (&to)[4], const Shared<T> &from, unsigned index, EMULATE_SITE) {
    emulate::load_tiles("ldmatrix_x4_trans", to, from, index, true, site);
}

template <class T> inline void cp_async_16(const Shared<T> &to, unsigned index, const void *from, unsigned valid = 16) {
    emulate::Machine &machine = emulate::Machine::current();
    emulate::check_aligned("cp_async_16", from);
    if (valid > 16) machine.fail("cp_async_16: %u valid bytes of 16", valid);
    machine.copy_later(to.at(index, 16, 16), from, 16, valid);
}
inline void cp_async_commit() { emulate::Machine::current().commit_copies(); }
template <int under_way> inline void cp_async_wait() { emulate::Machine::current().wait_copies(under_way); }

inline uint4 load_16(const void *from) {
    emulate::check_aligned("load_16", from);
    uint4 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline uint4 load_16_streaming(const void *from) { return load_16(from); }
inline void store_16(void *to, uint4 value) {
    emulate::check_aligned("store_16", to);
    std::memcpy(to, &value, sizeof value);
}
