// Shared memory behind checks, and atomics. Every access to shared memory goes through [Shared], which knows its bounds and tells the
// machine's shadow about it.
#pragma once

#include "warp.h"

namespace emulate {

// A place in shared memory as an atomic operation takes it.
template <class T> struct SharedAddress { T *at; };

// `tile[i]` as a left or right side. It lives for one expression only: a copy of it would be read later than it was written down.
template <class T> class Reference {
public:
    explicit Reference(T *at) : at_(at) {}
    Reference(const Reference &) = delete;

    operator T() && { return load(); }
    T operator=(T value) && { return store(value); }
    T operator=(Reference &&other) && { return store(other.load()); }
    T operator+=(T value) && { return store(static_cast<T>(load() + value)); }
    T operator-=(T value) && { return store(static_cast<T>(load() - value)); }
    T operator*=(T value) && { return store(static_cast<T>(load() * value)); }
    T operator|=(T value) && { return store(static_cast<T>(load() | value)); }
    T operator&=(T value) && { return store(static_cast<T>(load() & value)); }

private:
    T load() const {
        Machine::current().touch(at_, sizeof(T), Access::read);
        return *at_;
    }
    T store(T value) {
        Machine::current().touch(at_, sizeof(T), Access::write);
        return *at_ = value;
    }
    T *at_;
};

}  // namespace emulate

// An array in shared memory.
template <class T> class Shared {
public:
    Shared(T *data, unsigned count) : data_(data), count_(count) {}

    emulate::Reference<T> operator[](unsigned index) const { return emulate::Reference<T>(at(index, sizeof(T), alignof(T))); }

    // A wider value that starts at element `index`.
    template <class V> V read(unsigned index) const {
        const T *from = at(index, sizeof(V), alignof(V));
        emulate::Machine::current().touch(from, sizeof(V), emulate::Access::read);
        V value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    template <class V> void write(unsigned index, V value) const {
        T *to = at(index, sizeof(V), alignof(V));
        emulate::Machine::current().touch(to, sizeof(V), emulate::Access::write);
        std::memcpy(static_cast<void *>(to), &value, sizeof value);
    }

    // The array from element `offset` on.
    Shared operator+(unsigned offset) const {
        if (offset > count_) emulate::Machine::current().fail("shared memory: element %u of an array of %u", offset, count_);
        return Shared(data_ + offset, count_ - offset);
    }
    // The same bytes as another type.
    template <class V> Shared<V> as() const {
        return Shared<V>(reinterpret_cast<V *>(data_), static_cast<unsigned>(count_ * sizeof(T) / sizeof(V)));
    }
    // For atomic operations.
    emulate::SharedAddress<T> address(unsigned index) const { return {at(index, sizeof(T), alignof(T))}; }

    // Where `bytes` bytes that start at element `index` lie; for the wrappers of instructions.
    T *at(unsigned index, std::size_t bytes, std::size_t alignment) const {
        if (index * sizeof(T) + bytes > count_ * sizeof(T)) {
            emulate::Machine::current().fail("shared memory: %zu bytes at element %u of an array of %u elements of %zu bytes", bytes, index,
                                             count_, sizeof(T));
        }
        T *found = data_ + index;
        if (reinterpret_cast<std::uintptr_t>(found) % alignment != 0) {
            emulate::Machine::current().fail("shared memory: element %u is not aligned to %zu bytes", index, alignment);
        }
        return found;
    }

private:
    T *data_;
    unsigned count_;
};

// `count` elements of T per block, named `name`.
#define SHARED_ARRAY(T, name, count)                                                                                                  \
    static const char name##_key = 0;                                                                                                 \
    const Shared<T> name(reinterpret_cast<T *>(::emulate::Machine::current().static_shared(&name##_key, sizeof(T) * (count))), (count))

// `count` elements of T in the launch's dynamic shared memory, from byte `offset` on.
template <class T> inline Shared<T> dynamic_shared(unsigned offset, unsigned count) {
    emulate::Machine &machine = emulate::Machine::current();
    if (offset + count * sizeof(T) > machine.dynamic_bytes()) {
        machine.fail("dynamic shared memory: bytes %u to %zu of the %zu that the launch asked for", offset, offset + count * sizeof(T),
                     machine.dynamic_bytes());
    }
    if (offset % alignof(T) != 0) machine.fail("dynamic shared memory: byte %u is not aligned to %zu bytes", offset, alignof(T));
    return Shared<T>(reinterpret_cast<T *>(machine.dynamic_shared() + offset), count);
}

// Fibers change only at barriers, so a plain read and write is atomic.
#define EMULATE_ATOMIC(name, expression)                                                                                              \
    template <class T> inline T name(T *at, T value) {                                                                                \
        const T old = *at;                                                                                                            \
        *at = (expression);                                                                                                           \
        return old;                                                                                                                   \
    }                                                                                                                                 \
    template <class T> inline T name(emulate::SharedAddress<T> place, T value) {                                                      \
        emulate::Machine::current().touch(place.at, sizeof(T), emulate::Access::atomic);                                              \
        return name(place.at, value);                                                                                                 \
    }
EMULATE_ATOMIC(atomicAdd, old + value)
EMULATE_ATOMIC(atomicSub, old - value)
EMULATE_ATOMIC(atomicMin, value < old ? value : old)
EMULATE_ATOMIC(atomicMax, value > old ? value : old)
EMULATE_ATOMIC(atomicAnd, old & value)
EMULATE_ATOMIC(atomicOr, old | value)
EMULATE_ATOMIC(atomicXor, old ^ value)
EMULATE_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef EMULATE_ATOMIC

template <class T> inline T atomicCAS(T *at, T expected, T value) {
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <class T> inline T atomicCAS(emulate::SharedAddress<T> place, T expected, T value) {
    emulate::Machine::current().touch(place.at, sizeof(T), emulate::Access::atomic);
    return atomicCAS(place.at, expected, value);
}
