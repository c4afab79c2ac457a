// Runs the kernels' sources as C++ on the CPU: what `common.cuh` includes when the compiler is not nvcc.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "instructions.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
// `__shared__` itself is not defined: only [Shared] is checked.

namespace emulate {

// One parameter as the caller checks it: "r16:4" is a pointer to constant 16-byte elements aligned to 4.
template <class P> struct Parameter {
    static std::string text() {
        if (std::is_floating_point<P>::value) return "f" + std::to_string(8 * sizeof(P));
        if (std::is_integral<P>::value) return (std::is_signed<P>::value ? "i" : "u") + std::to_string(8 * sizeof(P));
        return "b" + std::to_string(sizeof(P));
    }
};
template <class T> struct Parameter<T *> {
    static std::string text() {
        return (std::is_const<T>::value ? "r" : "w") + std::to_string(sizeof(T)) + ":" + std::to_string(alignof(T));
    }
};

template <class... P> inline std::string signature(void (*)(P...)) {
    std::string all;
    for (const std::string &one : std::initializer_list<std::string>{Parameter<P>::text()...}) all += (all.empty() ? "" : " ") + one;
    return all;
}

template <class... P, std::size_t... I> inline void call(void (*kernel)(P...), void **args, std::index_sequence<I...>) {
    static_cast<void>(args);
    kernel(*static_cast<P *>(args[I])...);
}
// Calls a kernel with the arguments that `args` points to, as cuLaunchKernel does.
template <class... P> inline void call(void (*kernel)(P...), void **args) { call(kernel, args, std::index_sequence_for<P...>()); }

// Runs a launch; 0, or 1 with what went wrong in `message`.
inline int launch(const Request *request, Machine::Body body, char *message, std::size_t capacity) {
    // Behind a pointer: the libraries of all kernels share little room for thread-local variables.
    static thread_local std::unique_ptr<Machine> machine;
    if (!machine) machine.reset(new Machine);
    const std::string error = machine->run(*request, body);
    if (error.empty()) return 0;
    std::snprintf(message, capacity, "%s", error.c_str());
    return 1;
}

}  // namespace emulate

#define EMULATE_EXPORT extern "C" __attribute__((visibility("default")))

// Names a kernel for the launcher: one line after its definition, at the start of the line, with the name written out.
#define KERNEL(name)                                                                                                                  \
    EMULATE_EXPORT const char *signature_##name() {                                                                                   \
        static const std::string text = emulate::signature(&name);                                                                   \
        return text.c_str();                                                                                                          \
    }                                                                                                                                 \
    EMULATE_EXPORT int run_##name(const emulate::Request *request, char *message, std::size_t capacity) {                             \
        return emulate::launch(request, [](void **args) { emulate::call(&name, args); }, message, capacity);                          \
    }                                                                                                                                 \
    static_assert(true, "")

#if defined(EMULATE_ADDRESS_SANITIZER)
// Lets the sanitizer know what lies around a device buffer.
EMULATE_EXPORT __attribute__((weak)) void emulate_guard(const void *at, std::size_t bytes) { ASAN_POISON_MEMORY_REGION(at, bytes); }
EMULATE_EXPORT __attribute__((weak)) void emulate_unguard(const void *at, std::size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(at, bytes); }
#endif
