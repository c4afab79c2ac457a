// CUDA's scalar intrinsics. What the hardware approximates (rsqrtf, exp2f, __expf, __fdividef) is correctly rounded here: a kernel
// whose result must be the same everywhere does not use those.
#pragma once

#include "types.h"

inline unsigned __float_as_uint(float value) { return emulate::bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulate::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return emulate::bits<float>(value); }
inline float __int_as_float(int value) { return emulate::bits<float>(value); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __expf(float a) { return static_cast<float>(std::exp(static_cast<double>(a))); }
inline float __logf(float a) { return static_cast<float>(std::log(static_cast<double>(a))); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }

namespace emulate {

// A float as an integer, saturated as the hardware does; NaN is 0.
template <class Integer> inline Integer saturate(double value) {
    const Integer low = std::numeric_limits<Integer>::min(), high = std::numeric_limits<Integer>::max();
    if (value != value) return 0;
    return value <= static_cast<double>(low) ? low : value >= static_cast<double>(high) ? high : static_cast<Integer>(value);
}

// `value` rounded to an f32 in the given direction.
inline float directed(double value, bool up) {
    const float near = static_cast<float>(value);
    if (static_cast<double>(near) == value || near != near) return near;
    if (up) return near > value ? near : std::nextafter(near, HUGE_VALF);
    return near < value ? near : std::nextafter(near, -HUGE_VALF);
}

inline float sum_directed(double a, double b, bool up) { return directed(sticky_sum(a, b), up); }

inline float quotient_directed(float a, float b, bool up) {
    const double quotient = static_cast<double>(a) / b;
    if (!std::isfinite(quotient) || quotient == 0) return static_cast<float>(quotient);
    const double rest = -std::fma(quotient, static_cast<double>(b), -static_cast<double>(a));
    return directed(sticky(quotient, b < 0 ? -rest : rest), up);
}

inline float root_directed(float a, bool up) {
    const double root = std::sqrt(static_cast<double>(a));
    if (!(root > 0) || std::isinf(root)) return static_cast<float>(root);
    return directed(sticky(root, -std::fma(root, root, -static_cast<double>(a))), up);
}

}  // namespace emulate

inline float __fadd_ru(float a, float b) { return emulate::sum_directed(a, b, true); }
inline float __fadd_rd(float a, float b) { return emulate::sum_directed(a, b, false); }
inline float __fsub_ru(float a, float b) { return emulate::sum_directed(a, -static_cast<double>(b), true); }
inline float __fsub_rd(float a, float b) { return emulate::sum_directed(a, -static_cast<double>(b), false); }
inline float __fmul_ru(float a, float b) { return emulate::directed(static_cast<double>(a) * b, true); }
inline float __fmul_rd(float a, float b) { return emulate::directed(static_cast<double>(a) * b, false); }
inline float __fmaf_ru(float a, float b, float c) { return emulate::sum_directed(static_cast<double>(a) * b, c, true); }
inline float __fmaf_rd(float a, float b, float c) { return emulate::sum_directed(static_cast<double>(a) * b, c, false); }
inline float __fdiv_ru(float a, float b) { return emulate::quotient_directed(a, b, true); }
inline float __fdiv_rd(float a, float b) { return emulate::quotient_directed(a, b, false); }
inline float __fsqrt_ru(float a) { return emulate::root_directed(a, true); }
inline float __fsqrt_rd(float a) { return emulate::root_directed(a, false); }

inline int __float2int_rn(float value) { return emulate::saturate<int>(std::nearbyint(static_cast<double>(value))); }
inline int __float2int_rz(float value) { return emulate::saturate<int>(std::trunc(static_cast<double>(value))); }
inline int __float2int_rd(float value) { return emulate::saturate<int>(std::floor(static_cast<double>(value))); }
inline int __float2int_ru(float value) { return emulate::saturate<int>(std::ceil(static_cast<double>(value))); }
inline unsigned __float2uint_rn(float value) { return emulate::saturate<unsigned>(std::nearbyint(static_cast<double>(value))); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __brev(unsigned value) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1u) << (31 - bit);
    return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}

// Each nibble of `selector` picks one of the eight bytes of y:x; its top bit spreads that byte's sign instead.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const std::uint64_t both = static_cast<std::uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int byte = 0; byte < 4; ++byte) {
        const unsigned pick = selector >> (4 * byte) & 15;
        unsigned found = static_cast<unsigned>(both >> (8 * (pick & 7)) & 255);
        if (pick & 8) found = found & 128 ? 255 : 0;
        result |= found << (8 * byte);
    }
    return result;
}

inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; ++byte) sum += static_cast<std::int8_t>(a >> (8 * byte)) * static_cast<std::int8_t>(b >> (8 * byte));
    return sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int byte = 0; byte < 4; ++byte) sum += (a >> (8 * byte) & 255) * (b >> (8 * byte) & 255);
    return sum;
}

template <class T> inline T __ldg(const T *at) { return *at; }
template <class T> inline T __ldcs(const T *at) { return *at; }
template <class T> inline T __ldcg(const T *at) { return *at; }
template <class T> inline void __stcs(T *at, T value) { *at = value; }
template <class T> inline void __stcg(T *at, T value) { *at = value; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
