// CUDA's vector and 16-bit types for a plain C++ compiler, with the rounding the hardware has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define VECTOR2(name, scalar, alignment)                                                                                              \
    struct alignas(alignment) name { scalar x, y; };                                                                                  \
    inline name make_##name(scalar x, scalar y) { return name{x, y}; }
#define VECTOR4(name, scalar, alignment)                                                                                              \
    struct alignas(alignment) name { scalar x, y, z, w; };                                                                            \
    inline name make_##name(scalar x, scalar y, scalar z, scalar w) { return name{x, y, z, w}; }

VECTOR2(char2, signed char, 2)
VECTOR2(uchar2, unsigned char, 2)
VECTOR2(short2, short, 4)
VECTOR2(ushort2, unsigned short, 4)
VECTOR2(int2, int, 8)
VECTOR2(uint2, unsigned, 8)
VECTOR2(float2, float, 8)
VECTOR2(ulonglong2, unsigned long long, 16)
VECTOR4(char4, signed char, 4)
VECTOR4(uchar4, unsigned char, 4)
VECTOR4(short4, short, 8)
VECTOR4(ushort4, unsigned short, 8)
VECTOR4(int4, int, 16)
VECTOR4(uint4, unsigned, 16)
VECTOR4(float4, float, 16)
#undef VECTOR2
#undef VECTOR4

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulate {

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

enum class Rounding { nearest, up, down, zero };

// `value` as a binary format of `mantissa` stored bits and an exponent of `width` bits, in one rounding.
inline std::uint16_t narrow(double value, int mantissa, int width, Rounding rounding) {
    const int bias = (1 << (width - 1)) - 1;
    const std::uint16_t infinity = static_cast<std::uint16_t>(((1 << width) - 1) << mantissa);
    const bool negative = std::signbit(value);
    const std::uint16_t sign = static_cast<std::uint16_t>(negative ? 0x8000 : 0);
    if (std::isnan(value)) return static_cast<std::uint16_t>(0x7fff);
    const double size = std::fabs(value);
    if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
    if (size == 0) return sign;
    int exponent = 0;
    std::frexp(size, &exponent);
    const int unit = std::max(exponent - 1, 1 - bias) - mantissa;  // exponent of the last place
    const double scaled = std::ldexp(size, -unit);
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    const bool away = rounding == (negative ? Rounding::down : Rounding::up);
    if (rounding == Rounding::nearest ? rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) != 0) : away && rest > 0) whole += 1;
    const double largest = std::ldexp(2.0 - std::ldexp(1.0, -mantissa), bias);
    if (std::ldexp(whole, unit) > largest) {
        const bool finite = rounding == Rounding::zero || (rounding != Rounding::nearest && !away);
        return static_cast<std::uint16_t>(sign | (finite ? infinity - 1 : infinity));
    }
    // a carry out of the mantissa lands in the exponent, where it belongs
    const int field = unit + mantissa + bias - 1;
    return static_cast<std::uint16_t>(sign | ((field << mantissa) + static_cast<int>(whole)));
}

// The exact value `near + rest`, of which `near` is the nearest double: left with an odd last bit unless it is exact, so that one more
// rounding, in whatever direction, goes where the exact value would.
inline double sticky(double near, double rest) {
    if (rest == 0 || !std::isfinite(near) || (bits<std::uint64_t>(near) & 1)) return near;
    return std::nextafter(near, rest > 0 ? HUGE_VAL : -HUGE_VAL);
}

// The exact sum, made ready for one more rounding.
inline double sticky_sum(double a, double b) {
    const double sum = a + b, part = sum - a;
    return std::isfinite(sum) ? sticky(sum, (a - (sum - part)) + (b - part)) : sum;
}

}  // namespace emulate

struct alignas(2) __half {
    std::uint16_t raw;
    __half() = default;
    __half(float value);
    operator float() const;
};
struct alignas(2) __nv_bfloat16 {
    std::uint16_t raw;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value);
    operator float() const { return emulate::bits<float>(static_cast<std::uint32_t>(raw) << 16); }
};
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x, __half y) : x(x), y(y) {}
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.raw);
#else
    const std::uint32_t sign = (value.raw & 0x8000u) << 16, exponent = value.raw >> 10 & 31, mantissa = value.raw & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
    if (exponent == 31) return emulate::bits<float>(sign | 0x7f800000u | mantissa << 13);
    return emulate::bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}
inline __half __ushort_as_half(unsigned short raw) {
    __half value;
    value.raw = raw;
    return value;
}
inline unsigned short __half_as_ushort(__half value) { return value.raw; }
inline __half __float2half_rn(float value) {
#if defined(__F16C__)
    return __ushort_as_half(value != value ? 0x7fff : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return __ushort_as_half(emulate::narrow(value, 10, 5, emulate::Rounding::nearest));
#endif
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __float2half_ru(float value) { return __ushort_as_half(emulate::narrow(value, 10, 5, emulate::Rounding::up)); }
inline __half __float2half_rd(float value) { return __ushort_as_half(emulate::narrow(value, 10, 5, emulate::Rounding::down)); }
inline __half __float2half_rz(float value) { return __ushort_as_half(emulate::narrow(value, 10, 5, emulate::Rounding::zero)); }
inline __half::__half(float value) : __half(__float2half_rn(value)) {}
inline __half::operator float() const { return __half2float(*this); }

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short raw) {
    __nv_bfloat16 value;
    value.raw = raw;
    return value;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.raw; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    return __ushort_as_bfloat16(emulate::narrow(value, 7, 8, emulate::Rounding::nearest));
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16::__nv_bfloat16(float value) : __nv_bfloat16(__float2bfloat16_rn(value)) {}

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline __half2 __float2half2_rn(float value) { return __floats2half2_rn(value, value); }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {__bfloat162float(value.x), __bfloat162float(value.y)}; }

// f32 holds enough bits (24 >= 2 * 11 + 2) for the second rounding of these to be harmless.
inline __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
inline __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
inline __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
inline __half __hdiv(__half a, __half b) { return __float2half_rn(__half2float(a) / __half2float(b)); }
inline __half __hfma(__half a, __half b, __half c) {
    const double product = static_cast<double>(__half2float(a)) * __half2float(b);  // exact
    const double sum = emulate::sticky_sum(product, __half2float(c));
    return __ushort_as_half(emulate::narrow(sum, 10, 5, emulate::Rounding::nearest));
}
inline __half __hneg(__half a) { return __ushort_as_half(static_cast<unsigned short>(a.raw ^ 0x8000)); }
inline __half __habs(__half a) { return __ushort_as_half(static_cast<unsigned short>(a.raw & 0x7fff)); }
inline __half __hmax(__half a, __half b) { return __float2half_rn(std::fmax(__half2float(a), __half2float(b))); }
inline __half __hmin(__half a, __half b) { return __float2half_rn(std::fmin(__half2float(a), __half2float(b))); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
