// Thread indices, barriers and warp-wide operations over the running [Machine].
#pragma once

#include <type_traits>

#include "machine.h"
#include "math.h"

#define threadIdx (::emulate::Machine::current().thread().index)
#define blockIdx (::emulate::Machine::current().block_index())
#define blockDim (::emulate::Machine::current().block_size())
#define gridDim (::emulate::Machine::current().grid_size())
constexpr int warpSize = 32;

#define EMULATE_SITE emulate::Site site = emulate::Site::here(__builtin_FILE(), __builtin_LINE())

inline void __syncthreads(EMULATE_SITE) { emulate::Machine::current().barrier(false, site); }
inline int __syncthreads_count(int predicate, EMULATE_SITE) {
    return static_cast<int>(emulate::Machine::current().barrier(predicate != 0, site));
}
inline int __syncthreads_or(int predicate, EMULATE_SITE) { return emulate::Machine::current().barrier(predicate != 0, site) != 0; }
inline int __syncthreads_and(int predicate, EMULATE_SITE) { return emulate::Machine::current().barrier(predicate == 0, site) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulate::Machine::current().fail("__trap"); }

namespace emulate {

// What every lane of `mask` posted in one warp-wide operation.
template <class T> class Gathered {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 64, "lanes exchange small plain values");

public:
    Gathered(const char *what, unsigned mask, const T &own, Site site)
        : what_(what), site_(site), meeting_(Machine::current().meet(what, mask, &own, sizeof own, site)) {}

    T operator[](unsigned lane) const {
        if (!(meeting_->arrived >> lane & 1)) {
            Machine::current().fail("%s at %s reads lane %u, which does not take part", what_, site_.text().c_str(), lane);
        }
        T value;
        std::memcpy(&value, meeting_->posted[lane], sizeof value);
        return value;
    }
    unsigned lanes() const { return meeting_->arrived; }

private:
    const char *what_;
    Site site_;
    std::shared_ptr<Meeting> meeting_;
};

// All 32 lanes, or the kernel fails.
template <class T> inline Gathered<T> gather_warp(const char *what, const T &own, Site site) {
    Gathered<T> all(what, ~0u, own, site);
    if (all.lanes() != ~0u) Machine::current().fail("%s at %s needs all 32 lanes of the warp", what, site.text().c_str());
    return all;
}

template <class T, class F> inline T reduce(const char *what, unsigned mask, T own, Site site, F combine) {
    Gathered<T> all(what, mask, own, site);
    bool first = true;
    T result{};
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(all.lanes() >> lane & 1)) continue;
        result = first ? all[lane] : combine(result, all[lane]);
        first = false;
    }
    return result;
}

}  // namespace emulate

inline void __syncwarp(unsigned mask = ~0u, EMULATE_SITE) { emulate::Gathered<char>("__syncwarp", mask, 0, site); }

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATE_SITE) {
    const emulate::Gathered<T> all("__shfl_sync", mask, value, site);
    const unsigned lane = emulate::Machine::current().lane(), part = static_cast<unsigned>(width);
    return all[(lane & ~(part - 1)) + (static_cast<unsigned>(source) & (part - 1))];
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, EMULATE_SITE) {
    const emulate::Gathered<T> all("__shfl_xor_sync", mask, value, site);
    const unsigned lane = emulate::Machine::current().lane(), other = lane ^ static_cast<unsigned>(flip);
    return all[other / static_cast<unsigned>(width) > lane / static_cast<unsigned>(width) ? lane : other];
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATE_SITE) {
    const emulate::Gathered<T> all("__shfl_up_sync", mask, value, site);
    const unsigned lane = emulate::Machine::current().lane(), within = lane & (static_cast<unsigned>(width) - 1);
    return all[within < delta ? lane : lane - delta];
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATE_SITE) {
    const emulate::Gathered<T> all("__shfl_down_sync", mask, value, site);
    const unsigned lane = emulate::Machine::current().lane(), within = lane & (static_cast<unsigned>(width) - 1);
    return all[within + delta >= static_cast<unsigned>(width) ? lane : lane + delta];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATE_SITE) {
    const emulate::Gathered<int> all("__ballot_sync", mask, predicate, site);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (all.lanes() >> lane & 1) votes |= (all[lane] != 0 ? 1u : 0u) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, EMULATE_SITE) {
    return emulate::reduce("__any_sync", mask, predicate != 0 ? 1 : 0, site, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, EMULATE_SITE) {
    return emulate::reduce("__all_sync", mask, predicate != 0 ? 1 : 0, site, [](int a, int b) { return a & b; });
}

// Integers only, as on the hardware.
#define EMULATE_REDUCE(type, name, expression)                                                                                        \
    inline type name(unsigned mask, type value, EMULATE_SITE) {                                                                       \
        return emulate::reduce(#name, mask, value, site, [](type a, type b) -> type { return expression; });                         \
    }
EMULATE_REDUCE(int, __reduce_add_sync, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMULATE_REDUCE(int, __reduce_min_sync, a < b ? a : b)
EMULATE_REDUCE(int, __reduce_max_sync, a > b ? a : b)
EMULATE_REDUCE(unsigned, __reduce_add_sync, a + b)
EMULATE_REDUCE(unsigned, __reduce_min_sync, a < b ? a : b)
EMULATE_REDUCE(unsigned, __reduce_max_sync, a > b ? a : b)
EMULATE_REDUCE(unsigned, __reduce_and_sync, a & b)
EMULATE_REDUCE(unsigned, __reduce_or_sync, a | b)
EMULATE_REDUCE(unsigned, __reduce_xor_sync, a ^ b)
#undef EMULATE_REDUCE
